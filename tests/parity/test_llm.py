"""The v1 language model against the original's numbers."""

import torch

from cosyexp.data.views.llm import LanguageBatch
from cosyexp.models.llm.sampling import ras
from cosyexp.models.llm.transformer_lm import TransformerLM
from cosyexp.objectives.language import Language
from tests.parity.conftest import encoder


def network(fixture):
    given = fixture["config"]
    net = TransformerLM(
        text_vocabulary=given["text_token_size"],
        speech_vocabulary=given["speech_token_size"],
        text_width=given["text_encoder_input_size"],
        speaker_dim=given["spk_embed_dim"],
        text_encoder=encoder(given["text_encoder"], "conformer"),
        llm=encoder(given["llm"], "transformer"),
    )
    assert list(net.state_dict()) == list(fixture["state_dict"])
    net.load_state_dict(fixture["state_dict"])
    return net.eval()


def batch_of(given):
    return LanguageBatch(
        utts=tuple(map(str, range(len(given["text_token"])))),
        text_BL=given["text_token"],
        text_lens_B=given["text_token_len"].long(),
        speech_BN=given["speech_token"],
        speech_lens_B=given["speech_token_len"].long(),
        speaker_BE=given["embedding"],
    )


def test_loss_accuracy_and_gradients(fixture, close):
    numbers = fixture("llm_v1")
    net, batch = network(numbers), batch_of(numbers["batch"])
    objective = Language(net, optimizer=None, scheduler=None)
    loss = next(objective.turns(batch))
    tokens = objective.weights(batch)["tokens"]
    total = loss.scaled({"tokens": tokens})
    total.backward()
    close("loss", total, numbers["train"]["out"]["loss"])
    close("accuracy", loss["acc"].sum / tokens, numbers["train"]["out"]["acc"])
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.grad, numbers["train"]["grads"][name], rtol=1e-4, atol=1e-6)


def test_label_smoothing(fixture, close):
    numbers = fixture("llm_v1")
    batch = batch_of(numbers["batch"])
    for smoothing in (0.0, 0.1):
        objective = Language(network(numbers), optimizer=None, scheduler=None, smoothing=smoothing)
        total = objective.validate(batch)["ce"].sum
        variants = numbers["loss_variants"]
        close(f"per token {smoothing}", total / objective.weights(batch)["tokens"], variants[f"lsm{smoothing}_normTrue"])
        close(f"per row {smoothing}", total / len(batch), variants[f"lsm{smoothing}_normFalse"])


def decode(net, given, choose):
    """Decoding after a prompt, with the original's limits: 2 to 6 speech tokens for a text token."""
    text = torch.cat([given["prompt_text"], given["text"]], dim=1)
    prefix = net.prefix(text, torch.tensor([text.size(1)]), given["embedding"])
    x = torch.cat([prefix, net.speech_embedding(given["prompt_speech_token"])], dim=1)
    logp, cache = net.decode(x, net.llm.empty_cache(x))
    tokens, seen = [], []
    while len(tokens) < 6 * given["text"].size(1):
        row = logp[0].clone()
        if len(tokens) < 2 * given["text"].size(1):
            row[net.end_of_speech] = -torch.inf
        seen.append(row)
        token = choose(row, tokens)
        if token == net.end_of_speech:
            break
        tokens.append(token)
        logp, cache = net.decode(net.speech_embedding(torch.tensor([[token]])), cache)
    return tokens, torch.stack(seen)


@torch.no_grad()
def test_greedy_decoding_with_the_cache(fixture, close):
    numbers = fixture("llm_v1")
    tokens, logp = decode(network(numbers), numbers["inference_input"], lambda row, _: int(row.argmax()))
    assert tokens == numbers["inference_greedy"]["tokens"]
    wanted = numbers["inference_greedy"]["logp"]
    finite = wanted.isfinite()
    assert torch.equal(logp.isfinite(), finite)
    close("log-probabilities", logp[finite], wanted[finite])


@torch.no_grad()
def test_repetition_aware_decoding(fixture):
    numbers = fixture("llm_v1")
    drawn = [int(value) for _, value in numbers["inference_ras"]["tape"]]
    tokens, _ = decode(network(numbers), numbers["inference_input"], lambda row, history: ras(row, history, lambda weights: drawn.pop(0)))
    assert tokens == numbers["inference_ras"]["tokens"]
    assert not drawn
