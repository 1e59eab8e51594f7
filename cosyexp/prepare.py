"""Prepares recordings and texts as parquet shards, with speech tokens and speaker embeddings.

  corpus=auto            corpus.root=... is a folder or file in any known layout (LJSpeech, VITS,
                         Kaldi, Hugging Face, ...): what was found is printed first
  corpus=demo|ljspeech|libritts|kaldi|table
                         the built-in corpus, or one layout only
  speech_tokenizer=kmeans|onnx
                         onnx: speech_tokenizer.path=speech_tokenizer_v2.onnx
  speaker_encoder=mel|onnx
                         onnx: speaker_encoder.path=campplus.onnx
  family=demo            family of models, which defines the token rate; families of the same rate
                         can share a data set
  out=...                folder to write; default data/<corpus>_<rate>hz
  segment=vad transcribe=whisper
                         cut long recordings at pauses, and write the texts that are missing
  verify=asr             compare the texts with what a speech recognizer hears
  normalize=en|zh        write numbers and abbreviations as words
  trim=true loudness=-23 cut silence at both ends; scale to a loudness in LUFS
  filter='snr > 15 and wer < 0.3'
                         keep these recordings only; dry_run=true writes report.html only
  cache=[mel,f0,wave]    compute now what flow (mel) and hifigan (all three) will read
  inspect=...            describe a data list, a parquet file or a prepared folder instead

The same command resumes an interrupted preparation.

Examples
  python -m cosyexp.prepare corpus=auto corpus.root=~/LJSpeech-1.1 out=data/lj processes=8
  python -m cosyexp.prepare corpus=auto corpus.root=all.csv corpus.columns.audio=file out=data/mine
  python -m cosyexp.prepare inspect=data/mine/train.list
"""

from cosyexp.cli.hydra_app import hydra_app
from cosyexp.config import PrepareConfig


@hydra_app("prepare", PrepareConfig, free=("filter",), lists=("cache",))
def main(config: PrepareConfig) -> None:
    """Prepares a corpus or describes data, and prints a summary."""
    import os
    from pathlib import Path

    from cosyexp.data.inspection import inspect
    from cosyexp.data.preparation import prepare_corpus
    from cosyexp.data.prepared import audio_fields, fill_cache
    from cosyexp.data.report import lines
    from cosyexp.data.treatment import Treatment
    from cosyexp.registry import build
    from cosyexp.run.logs import console

    if config.inspect:
        for line in inspect(
            os.path.expanduser(config.inspect), build(config.family.tokenizer, "tokenizer")
        ):
            print(line)
        return
    out = Path(config.out).expanduser()
    fields = audio_fields(config.family, config.cache)
    with console():
        meta = prepare_corpus(
            config.corpus,
            config.family,
            out,
            build(config.speech_tokenizer, "front_end"),
            build(config.speaker_encoder, "front_end"),
            shard_size=config.shard_size,
            fit_on=config.fit_on,
            max_seconds=config.max_seconds,
            processes=config.processes,
            max_bad=config.max_bad,
            seed=config.seed,
            filter=config.filter,
            max_unknown=config.max_unknown,
            segment=config.segment and build(config.segment, "segmenter"),
            treatment=Treatment(
                transcribe=config.transcribe and build(config.transcribe, "transcriber"),
                verify=config.verify and build(config.verify, "transcriber"),
                normalize=config.normalize,
                trim=config.trim,
                loudness=config.loudness,
            ),
            dry_run=config.dry_run,
        )
        if not config.dry_run:
            fill_cache(out, fields, config.processes)
    for line in lines(meta, out):
        print(line)


if __name__ == "__main__":
    main()
