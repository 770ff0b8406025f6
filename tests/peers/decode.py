"""Times decoding in PyTorch, for comparison with `dataflow bench --decode`.

llama: nanoGPT's `generate`, which runs the whole context again for every token. With --cache also a step with a
key-value cache. longhorn: one step of the recurrence, written by hand.

    python tests/peers/decode.py [--d-model 768 --layers 12 --heads 12 --vocab 50304] [--context 512] [--batch 1]

Prints one JSON object: milliseconds of a step (median) and tokens per second.
"""

import argparse
import json
import statistics
import time

import torch
import torch.nn.functional as F


def rms_norm(x, w):
    return F.rms_norm(x, (x.shape[-1],), w, 1e-5)


class Llama:
    def __init__(self, a):
        d, hidden = a.d_model, (8 * a.d_model // 3 + 255) // 256 * 256
        self.heads, self.dim = a.heads, d // a.heads
        new = lambda *shape: torch.randn(*shape) * 0.02
        self.wte = new(a.vocab, d)
        self.layers = [
            dict(n1=torch.ones(d), n2=torch.ones(d), qkv=new(3 * d, d), o=new(d, d),
                 f1=new(hidden, d), f2=new(hidden, d), f3=new(d, hidden))
            for _ in range(a.layers)
        ]
        self.norm = torch.ones(d)
        freq = 10000.0 ** (-torch.arange(0, self.dim, 2) / self.dim)
        angle = torch.arange(a.context + a.steps + 8)[:, None] * freq
        self.cos, self.sin = angle.cos(), angle.sin()

    def rotate(self, x, at):
        cos, sin = self.cos[at:at + x.shape[2]], self.sin[at:at + x.shape[2]]
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def __call__(self, idx, cache=None, at=0):
        b, t = idx.shape
        x = self.wte[idx]
        for i, l in enumerate(self.layers):
            qkv = F.linear(rms_norm(x, l["n1"]), l["qkv"]).view(b, t, 3, self.heads, self.dim)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            q, k = self.rotate(q, at), self.rotate(k, at)
            if cache is not None:
                cache[i][0][:, :, at:at + t], cache[i][1][:, :, at:at + t] = k, v
                k, v = cache[i][0][:, :, :at + t], cache[i][1][:, :, :at + t]
            y = F.scaled_dot_product_attention(q, k, v, is_causal=cache is None)
            x = x + F.linear(y.transpose(1, 2).reshape(b, t, -1), l["o"])
            h = rms_norm(x, l["n2"])
            x = x + F.linear(F.silu(F.linear(h, l["f1"])) * F.linear(h, l["f2"]), l["f3"])
        # of the last token only, as upstream does when there are no targets
        return F.linear(rms_norm(x[:, -1], self.norm), self.wte)


class Longhorn:
    def __init__(self, a):
        d, inner, self.n = a.d_model, 2 * a.d_model, 16
        self.rank = -(-d // 16)
        vocab = (a.vocab + 7) // 8 * 8
        new = lambda *shape: torch.randn(*shape) * 0.02
        self.wte = new(vocab, d)
        self.layers = [
            dict(n=torch.ones(d), inp=new(2 * inner, d), conv=new(inner, 4), conv_b=new(inner),
                 x=new(self.rank + 2 * self.n, inner), dt=new(inner, self.rank), dt_b=torch.zeros(inner),
                 skip=torch.ones(inner), out=new(d, inner))
            for _ in range(2 * a.layers)
        ]
        self.norm = torch.ones(d)
        self.state = [(torch.zeros(a.batch, inner, 3), torch.zeros(a.batch, inner, self.n)) for _ in self.layers]

    def __call__(self, token):
        h = self.wte[token]
        for i, l in enumerate(self.layers):
            u, z = F.linear(rms_norm(h, l["n"]), l["inp"]).chunk(2, -1)
            window, s = self.state[i]
            window = torch.cat([window, u[:, :, None]], 2)
            u = F.silu((window * l["conv"]).sum(2) + l["conv_b"])
            r, k, q = F.linear(u, l["x"]).split([self.rank, self.n, self.n], -1)
            beta = torch.sigmoid(F.linear(r, l["dt"], l["dt_b"]))
            e = beta / (1 + beta * (k * k).sum(-1, keepdim=True))
            s = (1 - e[:, :, None] * (k * k)[:, None]) * s + (e * u)[:, :, None] * k[:, None]
            self.state[i] = (window[:, :, 1:], s)
            y = (s * q[:, None]).sum(-1) + l["skip"] * u
            h = h + F.linear(y * F.silu(z), l["out"])
        return F.linear(rms_norm(h, self.norm), self.wte)


def timed(step, steps, batch):
    times = []
    for i in range(steps + 2):
        start = time.perf_counter()
        step(i)
        times.append(time.perf_counter() - start)
    median = statistics.median(times[2:])
    return dict(step_ms_median=1e3 * median, tokens_per_s=batch / median)


@torch.inference_mode()
def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in [("d-model", 768), ("layers", 12), ("heads", 12), ("vocab", 50304), ("context", 512),
                          ("batch", 1), ("steps", 10), ("threads", 2)]:
        p.add_argument(f"--{name}", type=int, default=default)
    p.add_argument("--cache", action="store_true")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    result = dict(vars(a), torch=torch.__version__)
    model = Llama(a)
    idx = torch.randint(a.vocab, (a.batch, a.context))

    def generate(i):
        nonlocal idx
        token = model(idx[:, -a.context:]).argmax(-1, keepdim=True)
        idx = torch.cat([idx, token], 1)

    result["llama"] = timed(generate, a.steps, a.batch)
    if a.cache:
        shape = (a.batch, a.heads, a.context + a.steps + 8, a.d_model // a.heads)
        cache = [(torch.zeros(shape), torch.zeros(shape)) for _ in model.layers]
        one = torch.zeros(a.batch, 1, dtype=torch.long)
        result["llama_cached"] = timed(lambda i: model(one, cache, a.context + i).argmax(-1), a.steps, a.batch)
    del model
    model = Longhorn(a)
    token = torch.zeros(a.batch, dtype=torch.long)
    result["longhorn"] = timed(lambda i: model(token).argmax(-1), a.steps, a.batch)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
