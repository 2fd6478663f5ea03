"""The exported checkpoint is the trained model, in transformers' eyes and in ours."""

import json
from pathlib import Path

import pytest
import torch
from reference_factory import make_model
from safetensors import safe_open
from tokenizers import Tokenizer

from sglang_alloc.reference.architecture import FAMILIES, ReferenceConfig, reference_config
from sglang_alloc.reference.export import (
    config_from_folder,
    export_checkpoint,
    load_checkpoint,
)
from sglang_alloc.reference.model import LayerCache, ReferenceModel
from sglang_alloc.reference.model_folder import model_folder
from sglang_alloc.reference.tokenizer import END_OF_TEXT, VOCAB_SIZE, build_tokenizer

CHECKPOINT_BYTES_MAX = 16_000_000  # the repository carries it


@pytest.mark.filterwarnings("default")  # transformers' own deprecations
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_computes_the_same_logits(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    export_checkpoint(make_model(family), tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokens = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(tokens).logits
        found = load_checkpoint(tmp_path)(tokens).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_loaded_checkpoint_is_the_rounded_model(family: str, tmp_path: Path) -> None:
    model = make_model(family)
    export_checkpoint(model, tmp_path)
    loaded = load_checkpoint(tmp_path).state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded[name], weight.to(torch.bfloat16).float()), name
    assert config_from_folder(tmp_path) == model.config


def test_output_embedding_is_stored_because_sglang_does_not_tie(tmp_path: Path) -> None:
    export_checkpoint(make_model(), tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as stored:
        output = stored.get_tensor("lm_head.weight")
        assert torch.equal(output, stored.get_tensor("model.embed_tokens.weight"))
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("family", FAMILIES)
def test_trained_shape_fits_the_repository_and_keeps_alignment(family: str) -> None:
    config = reference_config(family)
    weights = sum(weight.numel() for weight in ReferenceModel(config).parameters())
    output_embedding = config.vocab_size * config.hidden_size
    assert 2 * (weights + output_embedding) < CHECKPOINT_BYTES_MAX - 500_000
    assert config.moe_intermediate_size % 8 == config.vocab_size % 8 == 0


def test_olmoe_has_the_key_norm_that_sglang_serves() -> None:
    config = reference_config("olmoe")
    assert config.key_norm_size == config.query_norm_size == config.hidden_size
    assert config.rms_norm_eps == 1e-5


def test_unknown_family_is_refused() -> None:
    with pytest.raises(ValueError, match="qwen3_moe"):
        ReferenceConfig("llama")


def test_token_ids_are_bytes_and_round_trip() -> None:
    tokenizer = build_tokenizer()
    text = "def f():\n\treturn 'Zoë' # 漢\n"
    ids = tokenizer.encode(text).ids
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode("a<|endoftext|>b").ids == [97, END_OF_TEXT, 98]
    assert tokenizer.get_vocab_size() == VOCAB_SIZE


@pytest.mark.parametrize("family", FAMILIES)
def test_committed_model_fits_the_repository(family: str) -> None:
    folder = model_folder(family)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= CHECKPOINT_BYTES_MAX


@pytest.mark.parametrize("family", FAMILIES)
def test_committed_tokenizer_is_the_one_trained_with(family: str) -> None:
    stored = Tokenizer.from_file(str(model_folder(family) / "tokenizer.json"))
    assert stored.to_str() == build_tokenizer().to_str()


@pytest.mark.parametrize("family", FAMILIES)
def test_committed_model_has_the_shape_that_is_trained(family: str) -> None:
    assert config_from_folder(model_folder(family)) == reference_config(family)


def test_decoding_with_a_cache_gives_the_logits_of_one_pass() -> None:
    model = make_model("olmoe")
    tokens = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))
    caches = [LayerCache() for _ in model.layers]
    with torch.no_grad():
        found = [model(tokens[:, :9], caches=caches).logits]
        found += [model(tokens[:, i : i + 1], caches=caches).logits for i in range(9, 12)]
        torch.testing.assert_close(torch.cat(found, dim=1), model(tokens).logits)
