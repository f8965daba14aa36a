"""What must be the same where an adapter is trained and where it is served: template, tokenizer, and what both make of a fixed chat."""

import hashlib
from pathlib import Path

from services.pretrained.templates import ChatTemplate, JinjaTemplate, Message
from services.pretrained.tokenizer import Tokenizer

__all__ = ["fingerprint"]

# Letters that normalisers touch, a line feed, a markup look-alike, a pair of surrogates in UTF-16.
_PROBE = (Message("user", "Größe 7, 你好?\n"), Message("assistant", " ok <b>"), Message("user", "naïve 🚢"))


def fingerprint(directory: Path, tokenizer: Tokenizer, template: ChatTemplate) -> str:
    """SHA-256 in hex over tokenizer.json, the template's source, and the ids of a rendered probe.

    Raises TemplateRefused where the template takes no such chat.
    """
    found = hashlib.sha256()
    with (directory / "tokenizer.json").open("rb") as file:
        found.update(hashlib.file_digest(file, "sha256").digest())
    source = template.source if isinstance(template, JinjaTemplate) else template.name
    found.update(hashlib.sha256(source.encode()).digest())
    ids = tokenizer.encode_parts(template.render(_PROBE))
    found.update(",".join(map(str, [*tokenizer.prefix, -1, *ids])).encode())
    return found.hexdigest()
