"""What the tests of engine, cache and session share: tiny models, addressed inputs, a dense oracle without a cache."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn

settings.register_profile("streamgen", deadline=None, derandomize=True, database=None, max_examples=60)
settings.load_profile("streamgen")


def _draw(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _transformer(seed: int = 0, **changes):
    from streamgen.models.transformer import CausalWanTransformer3DModel

    sizes = dict(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8, freq_dim=16,
        ffn_dim=32, num_layers=2, text_len=6,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = CausalWanTransformer3DModel(**{**sizes, **changes}).eval()
    with torch.no_grad():  # sharp attention: what a query sees must show in the result
        for block in model.blocks:
            block.attn1.norm_q.weight.mul_(2)
            block.attn1.to_v.weight.mul_(2)
            block.scale_shift_table.add_(0.5)
    return model


class StubTransformer(nn.Module):
    """The least the engine needs: one head of attention over what the context shows, no text."""

    def __init__(self, head_dim: int = 4, channels: int = 4) -> None:
        super().__init__()
        from streamgen.models.rope import RotaryEmbedding

        self.config = SimpleNamespace(
            num_layers=1, num_attention_heads=1, attention_head_dim=head_dim, in_channels=channels,
            out_channels=channels, patch_size=(1, 1, 1),
        )
        self.scale = nn.Parameter(torch.tensor(0.5), requires_grad=False)
        self.rope = RotaryEmbedding(head_dim)

    def text_keys(self, embeds: Tensor) -> Tensor:
        return embeds

    def forward(self, x, timestep, *, text_keys, context, return_dict, commit_only):
        tokens = x.flatten(2).transpose(1, 2).unsqueeze(2)  # [B, L, 1, C]
        if commit_only:
            return context.stage(0, tokens, tokens)
        out = context.attend(0, tokens, tokens, tokens)
        return (self.scale * (x - out.squeeze(2).transpose(1, 2).unflatten(2, x.shape[2:])),)


def _rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Adjacent pairs of [B, L, H, D] as complex numbers times e^(i·turns), turns [L, D/2]."""
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(turns), turns)[:, None]).flatten(-2)


def _turns(rope, positions, height: int, width: int) -> Tensor:
    """[F·T, D/2] angles, from the formula: pair j of an axis with n pairs turns by 10000^(-j/n) per step."""
    axes = []
    grid = torch.cartesian_prod(
        torch.tensor([float(p) for p in positions], dtype=torch.float64),
        torch.arange(height, dtype=torch.float64),
        torch.arange(width, dtype=torch.float64),
    )
    for axis, count in enumerate(rope.pairs):
        axes.append(grid[:, axis, None] * 10000.0 ** (-torch.arange(count, dtype=torch.float64) / max(count, 1)))
    return torch.cat(axes, 1)


def _attention(query, key, value, bias=None) -> Tensor:
    """[B, L, H, D], softmax(q·k/√D + bias)·v written out, in float64."""
    logits = torch.einsum("bqhd,bkhd->bhqk", query.double(), key.double()) / query.shape[-1] ** 0.5
    if bias is not None:
        logits = logits + bias
    return torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), value.double())


class OracleContext:
    """Self-attention of a whole clip without any cache: every frame has its own keys and its own positions for them.

    `reads[i]`: what frame i of the call sees, as {frame index in the call: position}; `own[i]`: its query's position.
    """

    def __init__(self, rope, reads: list[dict[int, float]], own: list[float], height: int, width: int) -> None:
        self.rope, self.reads, self.own, self.size = rope, reads, own, (height, width)

    def attend(self, layer, query, key, value):
        tokens = self.size[0] * self.size[1]
        split = (-1, tokens)
        out = []
        for index, seen in enumerate(self.reads):
            part = slice(index * tokens, (index + 1) * tokens)
            q = _rotate(query[:, part], _turns(self.rope, [self.own[index]], *self.size))
            frames = sorted(seen)
            keys = key.unflatten(1, split)[:, frames].flatten(1, 2)
            values = value.unflatten(1, split)[:, frames].flatten(1, 2)
            keys = _rotate(keys, _turns(self.rope, [seen[f] for f in frames], *self.size))
            out.append(_attention(q, keys, values))
        return torch.cat(out, 1).to(query.dtype)

    def stage(self, layer, key, value):
        raise AssertionError("the oracle keeps nothing")


def _seen(chunk: int, size: int, window: int, sink: int, packed: bool) -> dict[int, float]:
    """{frame: position} that a chunk sees, itself included; written down from the definition, not from the policy."""
    end = (chunk + 1) * size
    frames = [f for f in range(end) if window == -1 or f < sink or f >= end - (window - sink)]
    return {f: (rank if packed else f) for rank, f in enumerate(frames)}


def _oracle_rollout(model, embeds, noise, ladder, chunks, size, window=-1, sink=0, packed=False):
    """Latents of a roll-out whose every forward recomputes all frames from their latents: [clean … | noisy chunk]."""
    batch, channels, _, height, width = noise.initial.shape
    shape, grid = (batch, channels, height, width), (height // 2, width // 2)
    done: list[Tensor] = []
    for chunk in range(chunks):
        frames = range(chunk * size, (chunk + 1) * size)
        seen = [_seen(f // size, size, window, sink, packed) for f in range(frames.stop)]
        context = OracleContext(model.rope, seen, [seen[f][f] for f in range(frames.stop)], *grid)
        x = noise.frames("initial", frames, 0, shape)
        for p, timestep in enumerate(ladder.timesteps):
            time = torch.tensor([[0.0] * frames.start + [timestep] * size])
            out = model(torch.cat([*done, x], 2), time, embeds, context=context, return_dict=False)[0]
            x = ladder.step(
                x, out[:, :, frames.start :].float(), p, lambda p=p, f=frames: noise.frames("renoise", f, p, shape)
            )
        done.append(x)
    return torch.cat(done, 2)


def _config(*overrides: str, preset: str = "self-forcing"):
    from streamgen.config import load_preset

    return load_preset(preset, ["ladder.timesteps=[1000,500]", *overrides])


def _tensor_noise(chunks: int, size: int = 3, batch: int = 1, latent=(4, 4), steps: int = 2, seed: int = 5):
    from streamgen.noise import TensorNoise

    shape = (batch, 4, chunks * size, *latent)
    return TensorNoise(_draw(*shape, seed=seed), _draw(steps - 1, *shape, seed=seed + 1))


@pytest.fixture
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def tiny():
    """Factories of tiny things: model(), stub(), draw(), noise(), config(); and the oracle, piece by piece."""
    return SimpleNamespace(
        model=_transformer, stub=StubTransformer, draw=_draw, noise=_tensor_noise, config=_config, seen=_seen,
        rollout=_oracle_rollout, rotate=_rotate, turns=_turns, attention=_attention,
    )  # fmt: skip


@pytest.fixture(scope="module")
def model(tiny):
    return tiny.model().requires_grad_(False)


@pytest.fixture(scope="module")
def embeds(tiny):
    """Three prompts."""
    return [tiny.draw(1, 5, 8, seed=40 + i) for i in range(3)]


class Keys:
    """A prompt's keys, one tensor [B, P, L, 1, D] per layer, as a bank reads them."""

    def __init__(self, keys):
        self.keys = keys

    @staticmethod
    def join(parts):
        return parts[0]

    stack = join


@pytest.fixture
def stub(tiny):
    """An attention layer that does not mind what it is told."""

    class Stub(tiny.stub):
        def text_keys(self, embeds):
            return Keys([embeds[:, None, :, None]])  # of the only layer

        def forward(self, x, timestep, prompt_index=None, **more):
            x = x.movedim(1, -1).contiguous().movedim(-1, 1)  # channels last: a token's lie side by side
            return super().forward(x, timestep, **more)

    return Stub()
