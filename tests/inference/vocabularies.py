"""Small tokenizers of the two kinds we serve, as tokenizer.json text."""

import json

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

WORDS = ["hello", "world", "the", "yes", "no", "tech", "sport"]
CONTROL = ["<bos>", "<eos>", "<turn>", "</turn>"]
PLACEHOLDER = "[image]"  # an added token that is not marked special, as some vocabularies have


def _merged(words):
    """Merges that build each word, left to right, and the vocabulary they need."""
    merges, pieces = [], []
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in pieces:
                merges.append((word[: end - 1], word[end - 1]))
                pieces.append(word[:end])
    return merges, pieces


def byte_fallback():
    """As Gemma's: blanks as ▁, unknown characters as byte tokens."""
    merges, pieces = _merged([*WORDS, *(f"▁{word}" for word in WORDS)])
    characters = [chr(code) for code in range(0x21, 0x7F)] + ["▁", "世", "界", "\n"]
    spellings = ["<pad>", *CONTROL, PLACEHOLDER, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *characters, *pieces]
    vocabulary = {spelling: place for place, spelling in enumerate(dict.fromkeys(spellings))}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _finish(tokenizer)


def byte_level():
    """As Qwen's and Llama 3's."""
    merges, pieces = _merged([*WORDS, *(f"Ġ{word}" for word in WORDS)])
    spellings = [*pre_tokenizers.ByteLevel.alphabet(), *pieces]
    vocabulary = {spelling: place for place, spelling in enumerate(sorted(dict.fromkeys(spellings)))}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _finish(tokenizer)


def _finish(tokenizer):
    tokenizer.add_special_tokens([AddedToken(spelling, special=True, normalized=False) for spelling in CONTROL])
    tokenizer.add_tokens([AddedToken(PLACEHOLDER, special=False, normalized=False), AddedToken("\n\n", special=False, normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))])
    return json.dumps(json.loads(tokenizer.to_str()))


KINDS = {"byte-fallback": byte_fallback, "byte-level": byte_level}
