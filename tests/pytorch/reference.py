"""Weights between this program and PyTorch, in both directions. Run by tests/cli/pytorch.rs.

    reference.py load REFERENCE MODEL WEIGHTS LOGITS CONFIG   our weights in the reference model give our logits
    reference.py save REFERENCE MODEL FOLDER CONFIG           the reference model's weights, as .pt files
    reference.py llama FOLDER CONFIG                          a LLaMA under Hugging Face's names, with its logits

REFERENCE is a folder with a `train.py` whose `build(name, **CONFIG)` makes the published model; CONFIG is JSON.
"""
import json
import math
import sys

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)


def build(reference, name, config):
    sys.path.insert(0, reference)
    import train
    return train.build(name, **config).eval()


def load(reference, name, weights, logits, config):
    model = build(reference, name, config)
    found = model.load_state_dict(load_file(weights), strict=False)
    # a state_dict lists a tied tensor twice: what shares memory with a loaded one is loaded
    state = model.state_dict()
    loaded = {value.data_ptr() for key, value in state.items() if key not in found.missing_keys}
    missing = [key for key in found.missing_keys if state[key].data_ptr() not in loaded]
    assert not missing and not found.unexpected_keys, (missing, found.unexpected_keys)
    expected = load_file(logits)
    with torch.no_grad():
        out = model(expected["tokens"].long())[0]
    assert out.shape == expected["logits"].shape, (out.shape, expected["logits"].shape)
    error = ((out - expected["logits"]).abs().max() / expected["logits"].abs().max()).item()
    print(f"{name}: relative error of the logits {error:.1e}")
    assert error < 1e-4, error


def save(reference, name, folder, config):
    torch.manual_seed(1)
    state = build(reference, name, config).state_dict()
    torch.save(state, f"{folder}/{name}.pt")
    # as a training script saves it, of a compiled model
    wrapped = {f"_orig_mod.{key}": value for key, value in state.items()}
    torch.save({"model": wrapped, "iter_num": 7, "best_val_loss": torch.tensor(1.5)}, f"{folder}/{name}-checkpoint.pt")
    torch.save({key: value.bfloat16() for key, value in state.items()}, f"{folder}/{name}-bf16.bin")
    save_file({key: value.clone() for key, value in state.items()}, f"{folder}/{name}.safetensors")


def rotate(x):
    """Rotary positions of x [B, H, T, D], channel i paired with i + D/2 (transformers, `rotate_half`)."""
    t, d = x.shape[-2:]
    angles = torch.outer(torch.arange(t), 10000.0 ** (-torch.arange(0, d, 2) / d)).repeat(1, 2)
    left, right = x.chunk(2, dim=-1)
    return x * angles.cos() + torch.cat([-right, left], dim=-1) * angles.sin()


def norm(x, weight):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * weight


def llama(folder, c):
    """LLaMA by its definition, with the names of transformers' `LlamaForCausalLM`."""
    torch.manual_seed(2)
    width, hidden, heads = c["d_model"], c["d_hidden"], c["n_head"]
    weight = lambda *shape: torch.randn(shape) / math.sqrt(shape[-1])
    w = {"model.embed_tokens.weight": weight(c["vocab"], width), "model.norm.weight": 1 + 0.1 * torch.randn(width)}
    for i in range(c["n_layer"]):
        layer = f"model.layers.{i}."
        for name in ("q", "k", "v", "o"):
            w[f"{layer}self_attn.{name}_proj.weight"] = weight(width, width)
        w[f"{layer}mlp.gate_proj.weight"], w[f"{layer}mlp.up_proj.weight"] = weight(hidden, width), weight(hidden, width)
        w[f"{layer}mlp.down_proj.weight"] = weight(width, hidden)
        for name in ("input_layernorm", "post_attention_layernorm"):
            w[f"{layer}{name}.weight"] = 1 + 0.1 * torch.randn(width)
        w[f"{layer}self_attn.rotary_emb.inv_freq"] = torch.ones(width // heads // 2)
    tokens = torch.randint(c["vocab"], (2, 16))
    x = w["model.embed_tokens.weight"][tokens]
    for i in range(c["n_layer"]):
        get = lambda name: w[f"model.layers.{i}.{name}.weight"]
        y = norm(x, get("input_layernorm"))
        q, k, v = ((y @ get(f"self_attn.{n}_proj").T).unflatten(-1, (heads, -1)).transpose(1, 2) for n in "qkv")
        y = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        x = x + y.transpose(1, 2).flatten(2) @ get("self_attn.o_proj").T
        y = norm(x, get("post_attention_layernorm"))
        y = F.silu(y @ get("mlp.gate_proj").T) * (y @ get("mlp.up_proj").T)
        x = x + y @ get("mlp.down_proj").T
    logits = norm(x, w["model.norm.weight"]) @ w["model.embed_tokens.weight"].T
    w["lm_head.weight"] = w["model.embed_tokens.weight"].clone()
    torch.save(w, f"{folder}/pytorch_model.bin")
    save_file({"tokens": tokens.int(), "logits": logits.contiguous()}, f"{folder}/logits.safetensors")


if __name__ == "__main__":
    command, *arguments, config = sys.argv[1:]
    {"load": load, "save": save, "llama": llama}[command](*arguments, json.loads(config))
