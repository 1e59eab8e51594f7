"""The export format hf: a v2 or v3 llm as a folder that transformers, vLLM or SGLang load.

Text and speech tokens become one vocabulary of a plain Qwen2, so the folder needs no code:

    ids           tokens                          row of the embedding     row of the output layer
    0 .. T-1      text                            text_embedding           the mean of all classes
    T .. T+V-1    speech tokens, special classes  speech_embedding         llm_decoder
    then (v2)     sos, task                       llm_embedding            the mean of all classes

A logit that is the mean of the others is never the largest, so nothing but a speech class wins. The
output layer of Qwen2 has no bias. That of v2 does: it becomes `sequence_bias` of
generation_config.json, less its mean, which changes no probability of a speech class.

B batch, L text tokens, N speech tokens, D width, T text tokens, V speech classes.
"""

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from cosyexp.config import TrainConfig
from cosyexp.errors import UserError
from cosyexp.exporting.export import refuse_parts
from cosyexp.exporting.report import merge_report, show
from cosyexp.exporting.source import ExportSource, load_network
from cosyexp.exporting.tokenizer import library_tokenizer
from cosyexp.exporting.verify import compare
from cosyexp.registry import register
from cosyexp.run.files import write_json, write_text
from cosyexp.run.folders import staged_files
from cosyexp.run.tensors import save_tensors

if TYPE_CHECKING:  # importing transformers takes a second
    from cosyexp.models.llm.qwen_lm import QwenLM

SOS, TASK, EOS, FILL = "<|sos|>", "<|task_id|>", "<|eos|>", "<|fill|>"
CARD = Path(__file__).parent / "hf_card.md"
# the prompt of a text, as the message of a user; an answer goes on with speech tokens
CHAT = (
    f"{{% for message in messages %}}{{% if message.role == 'user' %}}{SOS}{{{{ $instruct }}}}"
    f"{{{{ message.content }}}}{TASK}{{% else %}}{{{{ message.content }}}}{{% endif %}}"
    f"{{% endfor %}}"
)


class Vocabulary(NamedTuple):
    """The ids of the exported vocabulary.

    Attributes:
        text: T.
        speech: number of speech tokens.
        names: of the tokens from id T on: speech tokens, special classes, and (v2) sos and task.
        classes: V.
    """

    text: int
    speech: int
    names: list[str]
    classes: int

    def id(self, name: str) -> int:
        """Returns the id of a token that is not text."""
        return self.text + self.names.index(name)

    @property
    def ends(self) -> list[int]:
        """The ids that end an answer: all classes without a sound."""
        return list(range(self.text + self.speech, self.text + self.classes))


@register("format")
class HuggingFace:
    """Writes the folder of a `Qwen2ForCausalLM`, with its tokenizer and a model card.

    Args:
        tokenizer: folder of the tokenizer of Qwen2; None: that of the config of the model.
    """

    name = "hf"

    def __init__(self, *, tokenizer: str | None = None) -> None:
        self.tokenizer = tokenizer

    def export(
        self,
        source: ExportSource,
        out: Path,
        *,
        precision: str = "fp32",
        names: Sequence[str] | None = None,
        timed: bool = False,
        device: str = "cpu",
        node: dict[str, Any] | None = None,
    ) -> list[Path]:
        """Writes the folder, and returns the path of the weights; arguments as of `Format.export`.

        Raises:
            UserError: components or another precision than fp32 are asked for, the model is not an
                llm of Qwen2, there is no tokenizer, or transformers does not give its logits.
        """
        refuse_parts(self.name, names, precision)
        network = load_qwen(source)
        tokenizer = library_tokenizer(source.config, self.tokenizer)
        if tokenizer is None:
            raise UserError(
                "format=hf is for models that read the tokens of Qwen2, and this one has another "
                "tokenizer: choose another format"
            )
        vocabulary = vocabulary_of(source.config, network)
        path = out / "model.safetensors"
        with staged_files(out, self.name) as part:
            weights, bias_V = joined_weights(network, vocabulary)
            save_tensors(part / path.name, weights, {"format": "pt"})
            write_json(part / "config.json", qwen_config(network, vocabulary))
            write_json(part / "generation_config.json", generation_config(vocabulary, bias_V))
            write_tokenizer(part, tokenizer, vocabulary, source.config.family.instruct or "")
            write_text(part / "README.md", card(source.config, vocabulary, bias_V))
            report = verify(network, part, vocabulary, bias_V)
        entry = {"file": path.name, "bytes": path.stat().st_size, **report}
        whole = {
            "weights": str(source.weights),
            "runtime": f"transformers {version('transformers')}",
            "threads": torch.get_num_threads(),
        }
        merge_report(out, precision, whole, {"llm": entry})
        show(precision, whole, {"llm": entry})
        return [path]


def load_qwen(source: ExportSource) -> "QwenLM":
    """Returns the network of a v2 or v3 llm.

    Raises:
        UserError: it is another one.
    """
    refusal = UserError(
        "format=hf is for the llm of cosyvoice2 and cosyvoice3, which is a Qwen2: transformers has "
        "no network like this one, so choose another format"
    )
    if source.config.model.name != "llm":
        raise refusal
    from cosyexp.models.llm.qwen_lm import QwenLM

    network = load_network(source)
    if not isinstance(network, QwenLM) or not isinstance(network.llm_decoder, nn.Linear):
        raise refusal
    return network.eval().requires_grad_(False)


def vocabulary_of(config: TrainConfig, network: "QwenLM") -> Vocabulary:
    """Returns the ids of text, speech and special tokens."""
    speech, classes = config.family.speech_vocabulary, network.llm_decoder.out_features
    layout = config.model.collator["layout"]
    roles = {layout["eos"]: EOS, layout["fill_token"]: FILL}
    own = network.sos_task_classes
    if own is not None:
        roles |= {own[0] - speech: SOS, own[1] - speech: TASK}
    names = [f"<|s_{i}|>" for i in range(speech)]
    names += [roles.get(i, f"<|special_{i}|>") for i in range(classes - speech)]
    names += [SOS, TASK] if own is None else []
    return Vocabulary(network.text_embedding.num_embeddings, speech, names, classes)


def joined_weights(
    network: "QwenLM", vocabulary: Vocabulary
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Returns the weights of the Qwen2, and the bias (V,) that its output layer lacks, if any."""
    head_VD, bias_V = network.llm_decoder.weight, network.llm_decoder.bias
    embeddings = [network.text_embedding.weight, network.speech_embedding.weight]
    after = len(vocabulary.names) - vocabulary.classes
    if after:
        embeddings.append(network.llm_embedding.weight)
    mean_D = head_VD.double().mean(0).to(head_VD.dtype)
    rows = [mean_D.expand(vocabulary.text, -1), head_VD, mean_D.expand(after, -1)]
    body = {f"model.{name}": t for name, t in network.llm.model.model.state_dict().items()}
    weights = {
        **body,
        "model.embed_tokens.weight": torch.cat(embeddings),
        "lm_head.weight": torch.cat(rows),
    }
    return weights, None if bias_V is None else bias_V - bias_V.double().mean().to(bias_V.dtype)


def qwen_config(network: "QwenLM", vocabulary: Vocabulary) -> dict[str, Any]:
    """Returns config.json, in keys that older versions of transformers read too."""
    sizes = network.llm.model.config
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": vocabulary.text + len(vocabulary.names),
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.intermediate_size,
        "num_hidden_layers": sizes.num_hidden_layers,
        "num_attention_heads": sizes.num_attention_heads,
        "num_key_value_heads": sizes.num_key_value_heads,
        "max_position_embeddings": sizes.max_position_embeddings,
        "hidden_act": sizes.hidden_act,
        "rms_norm_eps": sizes.rms_norm_eps,
        "rope_theta": (sizes.rope_parameters or {})["rope_theta"],
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "bos_token_id": vocabulary.id(SOS),
        "eos_token_id": vocabulary.id(EOS),
    }


def generation_config(vocabulary: Vocabulary, bias_V: Tensor | None) -> dict[str, Any]:
    """Returns generation_config.json: what ends an answer, and the bias of the logits."""
    config: dict[str, Any] = {"eos_token_id": vocabulary.ends, "pad_token_id": vocabulary.id(EOS)}
    if bias_V is not None:
        config["sequence_bias"] = [
            [[vocabulary.text + i], value] for i, value in enumerate(bias_V.tolist())
        ]
    return config


def write_tokenizer(folder: Path, tokenizer: Any, vocabulary: Vocabulary, instruct: str) -> None:
    """Writes tokenizer.json and tokenizer_config.json.

    Args:
        folder: to write to.
        tokenizer: that of the text, which is changed.
        vocabulary: its further tokens; ids between both get a name too.
        instruct: the instruction of texts that have none.
    """
    from transformers import AddedToken

    unused = [f"<|unused_{i}|>" for i in range(len(tokenizer), vocabulary.text)]
    silent = {SOS, TASK, EOS, FILL}
    tokenizer.add_tokens(
        [
            AddedToken(name, normalized=False, special=name in silent)
            for name in [*unused, *vocabulary.names]
        ]
    )
    assert tokenizer.convert_tokens_to_ids(SOS) == vocabulary.id(SOS)
    write_text(folder / "tokenizer.json", tokenizer.backend_tokenizer.to_str())
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "clean_up_tokenization_spaces": False,
        "chat_template": Template(CHAT).substitute(instruct=json.dumps(instruct)),
    }
    write_json(folder / "tokenizer_config.json", config)


def card(config: TrainConfig, vocabulary: Vocabulary, bias_V: Tensor | None) -> str:
    """Returns the model card, with the layout of a prompt."""
    family = config.family
    few, many = family.speech_per_text
    values = {
        "family": family.name,
        "instruct": family.instruct or "",
        "text": vocabulary.text - 1,
        "first": vocabulary.text,
        "last": vocabulary.text + vocabulary.speech - 1,
        "speech": vocabulary.speech - 1,
        "ends": f"{vocabulary.ends[0]} to {vocabulary.ends[-1]}",
        "sos": vocabulary.id(SOS),
        "task": vocabulary.id(TASK),
        "rate": family.token_rate,
        "few": f"{few:g}",
        "many": f"{many:g}",
        "bias": "" if bias_V is None else BIAS,
    }
    return Template(CARD.read_text(encoding="utf-8")).substitute(values)


BIAS = """
The output layer of this model has a bias, which a Qwen2 has no place for: it is `sequence_bias` in
`generation_config.json`. `generate` of transformers adds it; other engines need it in each request,
for example as `logit_bias` of vLLM and SGLang, or `embedding_bias` of TensorRT-LLM:

```python
bias = {ids[0]: value for ids, value in json.load(open("generation_config.json"))["sequence_bias"]}
```
"""


# verification -------------------------------------------------------------------------------------


class NextToken(nn.Module):
    """The log-probabilities of the next speech class, in the form of a `Component`."""

    inputs = ("text", "speech")
    outputs = ("logp",)
    dynamic: Mapping[str, Mapping[int, str]] = {}

    def __init__(self, network: "QwenLM") -> None:
        super().__init__()
        self.network = network

    def forward(self, text_BL: Tensor, speech_BN: Tensor) -> Tensor:
        """Returns the log-probabilities (B, V) after the prompt and some speech tokens."""
        prompt = self.network.prompt(text_BL)
        x = torch.cat([prompt, self.network.speech_embedding(speech_BN)], dim=1)
        logp_BV, _ = self.network.decode(x, self.network.empty_cache(x))
        return logp_BV

    def example(self, size: int, draw: torch.Generator, batch: int = 1) -> tuple[Tensor, ...]:
        """Returns random inputs: a quarter of `size` are text tokens, the rest speech tokens."""
        text = self.network.text_embedding.num_embeddings
        speech = self.network.speech_embedding.num_embeddings
        shapes = (text, size // 4), (speech, size - size // 4)
        return tuple(torch.randint(high, (batch, n), generator=draw) for high, n in shapes)


def verify(
    network: "QwenLM", folder: Path, vocabulary: Vocabulary, bias_V: Tensor | None
) -> dict[str, Any]:
    """Compares the model that transformers loads with the network.

    Raises:
        UserError: they differ.
    """
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False, dtype=torch.float32
    )
    start, classes = vocabulary.text, slice(vocabulary.text, vocabulary.text + vocabulary.classes)

    def exported(text_BL: Tensor, speech_BN: Tensor) -> tuple[Tensor]:
        ends = [torch.full((len(text_BL), 1), vocabulary.id(name)) for name in (SOS, TASK)]
        ids_BT = torch.cat([ends[0], text_BL, ends[1], start + speech_BN], dim=1)
        with torch.inference_mode():
            logits_BV = model(ids_BT, logits_to_keep=1).logits[:, 0, classes]
        return (torch.log_softmax(logits_BV + (0 if bias_V is None else bias_V), dim=-1),)

    component: Any = NextToken(network)
    measured = compare(component, exported, name="hf")
    if not measured["passed"]:
        worst = max(measured["largest_error"].values())
        raise UserError(
            f"transformers gives other logits than PyTorch, by {worst:.1e}, so the export was not "
            f"kept: choose another format"
        )
    return measured
