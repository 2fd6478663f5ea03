"""Reference model: the byte-level tokenizer, 256 bytes and 8 specials, in Hugging Face form."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

END_OF_TEXT = 256
PAD = 259
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>",
            "<|reserved_0|>", "<|reserved_1|>", "<|reserved_2|>", "<|reserved_3|>")  # fmt: skip
VOCAB_SIZE = 256 + len(SPECIALS)  # 264: a multiple of 8, as GPU matrix kernels like it


def byte_characters() -> list[str]:
    """The printable stand-in of each byte in the byte-level alphabet: index = byte value."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    characters = {byte: chr(byte) for byte in visible}
    hidden = [byte for byte in range(256) if byte not in characters]
    characters.update({byte: chr(256 + i) for i, byte in enumerate(hidden)})
    return [characters[byte] for byte in range(256)]


def build_tokenizer() -> Tokenizer:
    """Byte-level BPE without merges, so a token id below 256 is the byte itself."""
    vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS])
    return tokenizer


def save_tokenizer(folder: Path, context_tokens: int) -> None:
    """Write tokenizer.json and tokenizer_config.json, which SGLang loads without a network."""
    build_tokenizer().save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_tokens,
        "eos_token": SPECIALS[0],
        "pad_token": SPECIALS[3],
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
