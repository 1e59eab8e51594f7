"""Synthesizes sentences with espeak-ng, as a separate program because the library is under the GPL.

It reads JSON lines {"text", "voice", "rate", "pitch", "range"} from stdin. For each it writes the
length of a WAV file (4 bytes, little-endian) and the file to stdout.
"""

import ctypes
import io
import json
import struct
import sys
import wave

SYNCHRONOUS, UTF8 = 2, 1
RATE, PITCH, RANGE = 1, 3, 4


def main() -> None:
    """Synthesizes the sentences of stdin until it ends."""
    import espeakng_loader

    library = ctypes.CDLL(espeakng_loader.get_library_path())
    sample_rate = library.espeak_Initialize(
        SYNCHRONOUS, 0, str(espeakng_loader.get_data_path()).encode(), 0
    )
    spoken = io.BytesIO()

    def keep(samples: "ctypes._Pointer[ctypes.c_short]", count: int, _: int) -> int:
        if samples and count:
            spoken.write(ctypes.string_at(samples, 2 * count))
        return 0

    callback = ctypes.CFUNCTYPE(
        ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
    )(keep)
    library.espeak_SetSynthCallback(callback)
    for line in sys.stdin:
        order = json.loads(line)
        if library.espeak_SetVoiceByName(order["voice"].encode()):
            sys.exit(f"espeak-ng has no voice {order['voice']}")
        for parameter, name in ((RATE, "rate"), (PITCH, "pitch"), (RANGE, "range")):
            library.espeak_SetParameter(parameter, order[name], 0)
        text = order["text"].encode() + b"\0"
        library.espeak_Synth(text, ctypes.c_size_t(len(text)), 0, 0, 0, UTF8, None, None)
        library.espeak_Synchronize()
        sys.stdout.buffer.write(wav(spoken.getvalue(), sample_rate))
        sys.stdout.buffer.flush()
        spoken.seek(0)
        spoken.truncate()


def wav(samples: bytes, sample_rate: int) -> bytes:
    """Returns a WAV file of 16-bit mono samples, preceded by its length."""
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setparams((1, 2, sample_rate, 0, "NONE", ""))
        writer.writeframes(samples)
    return struct.pack("<I", len(file.getvalue())) + file.getvalue()


if __name__ == "__main__":
    main()
