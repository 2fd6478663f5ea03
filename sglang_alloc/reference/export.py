"""Reference model: write and read the checkpoint that transformers and SGLang load."""

import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sglang_alloc.reference.architecture import ReferenceConfig, huggingface_config
from sglang_alloc.reference.model import ReferenceModel
from sglang_alloc.reference.tokenizer import save_tokenizer


def checkpoint_tensors(model: ReferenceModel) -> dict[str, Tensor]:
    """The weights under Hugging Face's names, one matrix per expert, bfloat16."""
    tensors: dict[str, Tensor] = {}
    for name, weight in model.state_dict().items():
        if name.endswith("mlp.gate_up"):
            stem = f"model.{name.removesuffix('gate_up')}experts"
            for expert, matrix in enumerate(weight):
                gate, up = matrix.chunk(2)
                tensors[f"{stem}.{expert}.gate_proj.weight"] = gate
                tensors[f"{stem}.{expert}.up_proj.weight"] = up
        elif name.endswith("mlp.down"):
            stem = f"model.{name.removesuffix('down')}experts"
            for expert, matrix in enumerate(weight):
                tensors[f"{stem}.{expert}.down_proj.weight"] = matrix
        else:
            tensors[f"model.{name}"] = weight
    tensors["lm_head.weight"] = model.embed_tokens.weight.clone()  # SGLang does not tie them
    return {name: t.detach().cpu().to(torch.bfloat16).contiguous() for name, t in tensors.items()}


def export_checkpoint(model: ReferenceModel, folder: Path) -> None:
    """Write config, weights and tokenizer into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = huggingface_config(model.config)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    temporary = folder / "model.safetensors.tmp"
    save_file(checkpoint_tensors(model), temporary, metadata={"format": "pt"})
    temporary.chmod(0o644)
    os.replace(temporary, folder / "model.safetensors")
    save_tokenizer(folder, model.config.max_positions)


def config_from_folder(folder: Path) -> ReferenceConfig:
    """Read a checkpoint's shape back from its config.json."""
    found = json.loads((folder / "config.json").read_text())
    inner = found.get("moe_intermediate_size", found["intermediate_size"])
    heads = found["num_attention_heads"]
    return ReferenceConfig(
        family=found["model_type"],
        num_layers=found["num_hidden_layers"],
        hidden_size=found["hidden_size"],
        num_heads=heads,
        num_kv_heads=found["num_key_value_heads"],
        head_dim=found.get("head_dim", found["hidden_size"] // heads),
        num_experts=found["num_experts"],
        top_k=found["num_experts_per_tok"],
        moe_intermediate_size=inner,
        vocab_size=found["vocab_size"],
        rope_theta=found["rope_theta"],
        rms_norm_eps=found["rms_norm_eps"],
        max_positions=found["max_position_embeddings"],
    )


def load_checkpoint(folder: Path) -> ReferenceModel:
    """Load an exported checkpoint, computing in float32."""
    config = config_from_folder(folder)
    stored = load_file(folder / "model.safetensors")
    model = ReferenceModel(config)
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            weight.copy_(_stored_weight(stored, name, config.num_experts))
    return model.eval()


def _stored_weight(stored: dict[str, Tensor], name: str, num_experts: int) -> Tensor:
    if not name.endswith(("mlp.gate_up", "mlp.down")):
        return stored[f"model.{name}"]
    stem = f"model.{name.rsplit('.', 1)[0]}.experts"
    kinds = ("gate_proj", "up_proj") if name.endswith("gate_up") else ("down_proj",)
    return torch.stack(
        [
            torch.cat([stored[f"{stem}.{expert}.{kind}.weight"] for kind in kinds])
            for expert in range(num_experts)
        ]
    )
