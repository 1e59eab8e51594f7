"""Names in a config that become names of files."""

from cosyexp.errors import UserError

ADAPTER = "adapter_model.safetensors"  # the weights of an adapter, as peft names them


def plain_name(name: str, key: str) -> str:
    """Returns a name that stays in its folder: no separator, no leading dot, nothing unprintable.

    Args:
        name: the name.
        key: where it comes from, for the message.

    Raises:
        UserError: it cannot be the name of a file.
    """
    if not name or name.startswith(".") or "/" in name or "\\" in name or not name.isprintable():
        raise UserError(
            f"{key}={name!r} becomes the name of a file: give one without separators, that does "
            f"not begin with a dot"
        )
    if len(name.encode()) > 200:
        raise UserError(f"{key}={name[:20]}... becomes the name of a file: give a shorter one")
    return name
