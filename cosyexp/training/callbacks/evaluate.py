"""Synthesizes and rates sentences while a model is trained."""

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cosyexp.config import MODELS
from cosyexp.errors import UserError
from cosyexp.evaluation.evaluate import select_rows
from cosyexp.evaluation.evaluator import Evaluator, Sample, Truth
from cosyexp.evaluation.judges.base import Judge
from cosyexp.evaluation.scores import Score, summarize
from cosyexp.exporting.source import ExportSource
from cosyexp.objectives.base import Audio
from cosyexp.pages import flac, write_page
from cosyexp.registry import register
from cosyexp.run.directory import RunDirectory
from cosyexp.run.files import replace_file
from cosyexp.run.tensors import save_tensors
from cosyexp.synthesis.backends import from_run, from_source
from cosyexp.training.callbacks.base import Callback

if TYPE_CHECKING:
    from cosyexp.training.trainer import Trainer

log = logging.getLogger(__name__)


@register("callback")
class Evaluate(Callback):
    """Adds the judges' metrics of synthesized sentences to validations.

    The trained model, as it is, and the other two synthesize the same sentences each time, with the
    same random draws. `listen.html` in the run has them side by side.

    Args:
        judges: rate the speech, by name.
        valid: data list of the sentences, or several.
        llm: run of the llm, unless it is trained.
        flow: run of the flow, unless it is trained.
        hifigan: run of the vocoder, unless it is trained.
        weights: which weights of these runs.
        every: validations between two evaluations; the last validation always has one.
        utterances: number of sentences, spread over the list.
    """

    def __init__(
        self,
        *,
        judges: Mapping[str, Judge],
        valid: Any,
        llm: str | None = None,
        flow: str | None = None,
        hifigan: str | None = None,
        weights: str = "best",
        every: int = 1,
        utterances: int = 8,
    ) -> None:
        self.judges, self.lists = list(judges.values()), valid
        self.runs = {"llm": llm, "flow": flow, "hifigan": hifigan}
        self.weights, self.every, self.utterances = weights, every, utterances
        rated = [name for judge in self.judges for name in judge.metrics]
        self.measures = ["duration_ratio", *rated]
        self.seen = 0  # number of validations
        self.history: dict[int, dict[str, float]] = {}  # what was measured, by step

    def on_fit_start(self, trainer: "Trainer") -> None:
        """Loads the other models, the judges and the sentences, on rank 0.

        Raises:
            UserError: a run or the sentences are missing, or one of them cannot be loaded.
        """
        others = [name for name in MODELS if name != trainer.model]
        if missing := [name for name in others if not self.runs[name]]:
            raise UserError(
                f"callbacks=evaluate synthesizes with all three models: give "
                f"callbacks.evaluate.{missing[0]}=<run>"
            )
        if not self.lists:
            raise UserError(
                "callbacks=evaluate is a part of the validation, but data.valid=null: give "
                "validation data, or leave out the callback"
            )
        if trainer.engine.rank > 0:
            return
        self.device = str(trainer.engine.device)
        for judge in self.judges:
            judge.load()
        with same_precision():
            self.others = {
                name: from_run(RunDirectory(str(self.runs[name])), self.weights, self.device)
                for name in others
            }
        lists: Sequence[str] = [self.lists] if isinstance(self.lists, str) else self.lists
        self.rows = list(select_rows(lists, self.utterances)[0])
        self.config = trainer.run.config()

    def measure(self, trainer: "Trainer") -> Mapping[str, float]:
        """Returns the means over the sentences, if it is time to measure them."""
        due, self.seen = self.seen % self.every == 0, self.seen + 1
        if not (due or trainer.done):
            return {}
        engine, values = trainer.engine, dict[str, float]()
        weights = {
            name: tensor.cpu() for name, tensor in engine.weights(trainer.model) if engine.rank == 0
        }
        if engine.rank == 0:
            values = self._evaluate(trainer, weights)
        return dict(engine.all_gather(values)[0])

    def state_dict(self) -> dict[str, Any]:
        """Returns the number of validations, and what was measured."""
        return {"seen": self.seen, "history": self.history}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.seen, self.history = state["seen"], dict(state["history"])

    def _evaluate(self, trainer: "Trainer", weights: Mapping[str, Tensor]) -> dict[str, float]:
        """Returns the means over the sentences; none if the network has diverged meanwhile.

        Raises:
            UserError: the models do not fit together, or the sentences cannot be used.
        """
        step = trainer.progress.step
        try:
            with same_precision(), torch.inference_mode():
                spoken = list(self._synthesize(trainer, weights))
        except UserError as error:
            if not self.history:
                raise
            log.warning("step %d is not evaluated: %s", step, error)
            return {}
        scores: dict[str, list[Score]] = defaultdict(list)
        for _, sample in spoken:
            for name, score in sample.scores.items():
                scores[name].append(score)
        self.history[step] = {name: summarize(s, name).mean for name, s in scores.items()}
        self._show(trainer, spoken)
        return self.history[step]

    def _synthesize(
        self, trainer: "Trainer", weights: Mapping[str, Tensor]
    ) -> Iterator[tuple[Truth, Sample]]:
        run = trainer.run
        with TemporaryDirectory() as folder:
            path = Path(folder, "model.safetensors")
            save_tensors(path, weights)
            speakers = run.speakers if run.speakers.exists() else None
            source = ExportSource(str(run), self.config, path, speakers)
            trained = from_source(source, self.device)
        evaluator = Evaluator({**self.others, trainer.model: trained}, self.judges, trainer.seed)
        self.sample_rate = evaluator.rate
        for truth in evaluator.truths(self.rows):
            yield truth, evaluator.synthesis(truth)

    def _show(self, trainer: "Trainer", spoken: Sequence[tuple[Truth, Sample]]) -> None:
        """Adds the sentences of this step to the loggers and to the page."""
        step = trainer.progress.step
        for number, (truth, sample) in enumerate(spoken):
            assert sample.wave_S is not None
            waves = {f"{step:08d}": sample.wave_S, "recording": truth.wave_S}
            for name, wave_S in waves.items():
                with replace_file(trainer.run.file("listen", f"{name}_{number}.flac")) as file:
                    file.write(flac(wave_S, self.sample_rate))
            for logger in trainer.loggers:
                audio = Audio(sample.wave_S, self.sample_rate)
                logger.log_media(step, f"{truth.utt}/synthesized", audio)
        write_page(
            trainer.run.file("listen.html"),
            "listen.html",
            run=str(trainer.run),
            texts=[truth.text for truth, _ in spoken],
            history=self.history,
        )


@contextmanager
def same_precision() -> Iterator[None]:
    """Restores the precision of convolutions, which loading a model for synthesis changes."""
    before = torch.backends.cudnn.allow_tf32
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
