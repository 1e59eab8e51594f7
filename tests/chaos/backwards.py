"""`python -m tests.chaos.backwards <overrides>`: trains while the clock runs backwards."""

import time

from cosyexp.train import main

if __name__ == "__main__":
    now = time.time
    began = now()
    time.time = lambda: began - 100 * (now() - began)
    main()
