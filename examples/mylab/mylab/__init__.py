"""Extensions of cosyexp: a network, an objective, an engine, and one of each other kind."""
