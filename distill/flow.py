"""Recipes `sprites/teacher` and `sprites/causal`: flow matching on latent clips, with text per chunk.

One network learns every way it will be streamed: the batches mix clean history (teacher forcing, as released causal
students expect), first chunks alone (where the text decides; many clips for little work), monotone joint windows
(rolling and diagonal schedules), level-matched history (per-level caches) and whole clips at one level (the
bidirectional teacher). Positions get random offsets, and a part of the clips jumps between their first chunk and the
rest, so that a sink in front of a window is nothing new.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from streamgen.config import check_choice
from streamgen.distill.data import ClipSpec, LatentClips, build_clips, check_favoured, tell, vocabulary
from streamgen.errors import InputError
from streamgen.evaluation.playing import Strip, draw_sheet, play
from streamgen.evaluation.suites import find_suite
from streamgen.evaluation.suites.base import Options, mean
from streamgen.evaluation.suites.scenes import ATTRIBUTES
from streamgen.hub import assets_root
from streamgen.ladder import TRAIN_STEPS, warp_timesteps
from streamgen.models.masks import FrameGroups, block_causal_mask, frame_groups, teacher_forcing_mask
from streamgen.models.text import TextEncoder, build_tokenizer
from streamgen.models.transformer import CausalWanTransformer3DModel
from streamgen.models.vae import StreamingVAE
from streamgen.pipelines.streaming import StreamingVideoPipeline


@dataclass
class FlowTask:
    """Shape of the network, of the clips, and of the mix of noise patterns."""

    codec: str = "assets"  # a folder, or the package's own
    init: str | None = None  # folder with `transformer` and `text_encoder` to start from
    clips: int = 4800
    first_chunks: int = 19200  # clips of one chunk: a first chunk costs a ninth of a clip and is what the text decides
    clip_chunks: int = 9
    chunks: int = 7
    chunk_frames: int = 3
    batch: int = 8  # clips of pattern "clean"; the others cost less per clip and take more, see PATTERNS
    dim: int = 256
    heads: int = 4
    layers: int = 8
    ffn: int = 1024
    text_dim: int = 128
    text_len: int = 32
    latent_channels: int = 24
    shift: float = 3.0
    prompt_dropout: float = 0.1
    unknown_words: float = 0.02
    # shares of clean | start | window | matched | whole; none by default, because YAML adds to what is there
    patterns: dict[str, float] = field(default_factory=dict)
    context_noise: float = 150.0  # history of half the clips is noised up to this timestep, and said to be
    gap: float = 0.25  # share of clips that jump between sink and window
    max_offset: int = 64
    favour: dict[str, float] = field(default_factory=dict)  # motion or shape -> how many times as often it is drawn
    samples: int = 8

    def __post_init__(self) -> None:
        check_favoured(self.favour)
        for name, share in self.patterns.items():
            check_choice("flow.patterns", name, tuple(PATTERNS))
            if not share >= 0:
                raise InputError(f"flow.patterns: {name} cannot have a share of {share}: give 0 or more")
        if not 2 <= self.chunks <= self.clip_chunks:
            raise InputError(f"flow.chunks={self.chunks}: give 2 to flow.clip_chunks={self.clip_chunks}")


@dataclass
class Batch:
    """One forward and its target: sequence frames F' may hold a clean and a noisy copy of each clip."""

    sequence: Tensor  # [B, C, F', h, w]
    timestep: Tensor  # [B, F']
    positions: Tensor  # [B, F']
    mask: Tensor | FrameGroups | None  # [B, F', F'], or groups where all clips have the same
    prompt_index: Tensor  # [B, F']
    target: Tensor  # [B, C, F', h, w]
    weight: Tensor  # [B, F'], 0 where nothing is learnt


@dataclass(frozen=True)
class Pattern:
    """How a noise pattern fills a batch: `clips` times the recipe's batch, of `chunks` chunks (None = all)."""

    clips: int
    chunks: int | None = None


PATTERNS = {
    "clean": Pattern(1),
    "start": Pattern(6, chunks=1),
    "window": Pattern(2),
    "matched": Pattern(2),
    "whole": Pattern(2),
}


class FlowTrainer:
    """Velocity matching; see the module's docstring for the patterns."""

    def __init__(self, config: FlowTask, device: torch.device, autocast: bool, compiled: bool) -> None:
        if not sum(config.patterns.values()):
            raise InputError("flow.patterns is empty: say what to train on, e.g. 'flow.patterns={clean: 1}'")
        self.config, self.device, self.autocast, self.init = config, device, autocast, config.init
        self.codec = config.codec if config.codec != "assets" else str(assets_root() / "sprites" / "vae")
        self.tokenizer = build_tokenizer(vocabulary(), config.text_len)
        self.module = nn.ModuleDict(
            {
                "transformer": CausalWanTransformer3DModel(
                    patch_size=(1, 2, 2),
                    num_attention_heads=config.heads,
                    attention_head_dim=config.dim // config.heads,
                    in_channels=config.latent_channels,
                    out_channels=config.latent_channels,
                    text_dim=config.text_dim,
                    freq_dim=256,
                    ffn_dim=config.ffn,
                    num_layers=config.layers,
                    text_len=config.text_len,
                ),
                "text_encoder": TextEncoder(len(self.tokenizer), config.text_dim, max_length=config.text_len),
            }
        ).to(device)
        self.module["transformer"].reset_parameters()
        if device.type == "cpu":  # two to ten times SDPA's backward at these lengths
            self.module["transformer"].set_attention_backend("math")
        if config.init:
            self._start_from(Path(config.init))
        self.transformer: Callable = self.module["transformer"]
        if compiled:
            self.transformer = torch.compile(self.module["transformer"], dynamic=False)
        self._clips: dict[ClipSpec, LatentClips] = {}

    def prepare(self) -> None:
        """Render and encode the clips that are not there yet. Raises InputError for a codec that is not."""
        if not (Path(self.codec) / "config.json").is_file():
            raise InputError(f"flow.codec={self.codec} is no folder of a codec: it has no config.json")
        wanted = (PATTERNS[name].chunks or self.config.chunks for name, share in self.config.patterns.items() if share)
        for chunks in set(wanted):
            self.clips(chunks)

    def _start_from(self, folder: Path) -> None:
        if not (folder / "transformer" / "config.json").is_file():
            raise InputError(f"flow.init={folder} is no model: it has no transformer/config.json")
        self.module["transformer"].load_state_dict(
            CausalWanTransformer3DModel.from_pretrained(folder / "transformer").state_dict()
        )
        self.module["text_encoder"].load_state_dict(
            TextEncoder.from_pretrained(folder / "text_encoder").state_dict()
        )

    def clips(self, chunks: int) -> LatentClips:
        """Clips to cut `chunks` chunks from; rendered and encoded at first use, kept on disk."""
        config = self.config
        if chunks == 1:
            spec = ClipSpec(self.codec, config.first_chunks, 1, config.chunk_frames, seed=1)
        else:
            spec = ClipSpec(self.codec, config.clips, config.clip_chunks, config.chunk_frames)
        if spec not in self._clips:
            path = Path("runs/sprites/clips") / spec.file_name
            if not path.exists():
                build_clips(spec, path)
            self._clips[spec] = LatentClips.load(path, config.chunk_frames, config.favour)
        return self._clips[spec]

    # ------------------------------------------------------------------------------------------- text
    def embed(self, prompts: list[str], rng: np.random.Generator | None = None) -> Tensor:
        """[N] prompts -> [N, text_len, text_dim]; with `rng`, some words are hidden."""
        tokens = self.tokenizer(
            prompts,
            padding="max_length",
            truncation=True,
            max_length=self.config.text_len,
            return_tensors="pt",
            return_token_type_ids=False,
        )
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        if rng is not None:
            hide = torch.from_numpy(rng.random(ids.shape) < self.config.unknown_words)
            ids = torch.where(hide & (ids > 2), torch.full_like(ids, self.tokenizer.unk_token_id), ids)
        return self.module["text_encoder"](ids.to(self.device), mask.to(self.device))

    # ------------------------------------------------------------------------------------------- batches
    def _clip(self, rng: np.random.Generator, count: int) -> tuple[Tensor, np.ndarray, list[str], np.ndarray]:
        """`count` chunks: latents [C, F, h, w], prompt index per frame, prompts, and which frames teach."""
        config, n, clips = self.config, self.config.chunk_frames, self.clips(count)
        index = clips.draw(rng)
        spare = clips.chunks - count
        gap = int(rng.integers(1, spare + 1)) if spare and rng.random() < config.gap else 0
        first = int(rng.integers(0, spare - gap + 1)) if spare and rng.random() < 0.4 else 0
        chunks = np.arange(count) + first
        chunks[1:] += gap
        frames = (chunks[:, None] * n + np.arange(n)).ravel()
        teach = np.ones(len(frames), np.float32)
        teach[:n] = 0.0 if first else 1.0  # a clip's first latent holds one frame, the others four
        teach[n : 2 * n] = 0.0 if gap else 1.0
        starts = [start for start, _ in clips.scenes[index]]
        which = np.repeat(np.searchsorted(starts, chunks, side="right") - 1, n)
        prompts = tell([scene for _, scene in clips.scenes[index]], rng)
        if rng.random() < config.prompt_dropout:
            prompts = [""] * len(prompts)
        return clips.latents[index][:, frames].float(), which, prompts, teach

    def _levels(self, pattern: str, rng: np.random.Generator, count: int, chunks: int) -> np.ndarray:
        """Noise level per chunk of `count` clips, [B, K] in 0..1 (0 = history)."""
        if pattern in ("clean", "start"):
            return rng.random((count, chunks))
        if pattern in ("matched", "whole"):
            return np.repeat(rng.random((count, 1)), chunks, 1)
        levels = np.zeros((count, chunks))
        for row in levels:
            size = int(rng.integers(2, min(5, chunks) + 1))
            first = int(rng.integers(0, chunks - size + 1))
            # equal steps apart, as a staggered ladder leaves them, at a random phase of the tick
            row[first : first + size] = (np.arange(size) + rng.random()) / size
            row[first + size :] = np.nan  # not entered yet
        return levels

    def _mask(self, pattern: str, levels: np.ndarray) -> Tensor | FrameGroups | None:
        n, chunks = self.config.chunk_frames, levels.shape[1]
        if pattern in ("start", "whole"):
            return None
        if pattern == "clean":
            return frame_groups(teacher_forcing_mask(n * chunks, n))
        if pattern == "matched":
            return frame_groups(block_causal_mask(n * chunks, n))
        flight = torch.from_numpy(np.repeat(levels > 0, n, 1))  # nan compares false
        return block_causal_mask(n * chunks, n) | (flight[:, :, None] & flight[:, None, :])

    def batch(self, rng: np.random.Generator) -> tuple[Batch, list[list[str]]]:
        config, n = self.config, self.config.chunk_frames
        names = list(config.patterns)
        share = np.array([config.patterns[name] for name in names])
        pattern = names[rng.choice(len(names), p=share / share.sum())]
        count = config.batch * PATTERNS[pattern].clips
        chunks = PATTERNS[pattern].chunks or config.chunks
        drawn = [self._clip(rng, chunks) for _ in range(count)]
        clean = torch.stack([d[0] for d in drawn])
        which = torch.from_numpy(np.stack([d[1] for d in drawn])).long()
        teach = torch.from_numpy(np.stack([d[3] for d in drawn]))
        levels = self._levels(pattern, rng, count, chunks)
        teach = teach * torch.from_numpy(np.repeat(np.nan_to_num(levels) > 0, n, 1)).float()
        raw = torch.from_numpy(np.repeat(np.nan_to_num(levels), n, 1)).float()
        level = warp_timesteps(TRAIN_STEPS * raw, config.shift) / TRAIN_STEPS
        noise = torch.randn(clean.shape)
        noisy = torch.lerp(clean, noise, level[:, None, :, None, None])
        target = noise - clean
        offset = torch.from_numpy(rng.integers(0, config.max_offset + 1, (count, 1)))
        positions = torch.arange(clean.shape[2])[None] + offset
        if pattern == "clean":
            context = torch.from_numpy(rng.random((count, 1)) * (rng.random((count, 1)) < 0.5)).float()
            context = (context * config.context_noise / 1000).expand(-1, clean.shape[2])
            history = torch.lerp(clean, torch.randn(clean.shape), context[:, None, :, None, None])
            noisy, level = torch.cat([history, noisy], 2), torch.cat([context, level], 1)
            target = torch.cat([torch.zeros_like(target), target], 2)
            teach = torch.cat([torch.zeros_like(teach), teach], 1)
            positions, which = torch.cat([positions] * 2, 1), torch.cat([which] * 2, 1)
        mask = self._mask(pattern, levels)
        fields = (noisy, level * 1000, positions, mask, which, target, teach)
        here = (f.to(self.device) if isinstance(f, Tensor) else f for f in fields)
        return Batch(*here), [d[2] for d in drawn]

    def loss(self, step: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        batch, prompts = self.batch(rng)
        most = 1 if batch.target.shape[2] == self.config.chunk_frames else 2  # a clip changes once; one shape each
        flat = [text for texts in prompts for text in texts + [texts[-1]] * (most - len(texts))]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            text = self.embed(flat, rng).unflatten(0, (-1, most))  # [B, P, L, D]
            velocity = self.transformer(
                batch.sequence,
                batch.timestep,
                text,
                return_dict=False,
                prompt_index=batch.prompt_index,
                frame_positions=batch.positions,
                frame_mask=batch.mask,
            )[0]
        error = (velocity.float() - batch.target).square().mean((1, 3, 4))  # [B, F']
        return (error * batch.weight).sum() / batch.weight.sum().clamp(min=1), {}

    # ------------------------------------------------------------------------------------------- results
    def pipeline(self, module: nn.ModuleDict) -> StreamingVideoPipeline:
        """The network as a user would stream it: codec, default preset, the model's overrides."""
        codec = StreamingVAE.from_pretrained(self.codec).to(self.device)
        return StreamingVideoPipeline(
            self.tokenizer, module["text_encoder"], module["transformer"], codec, model_name="sprites"
        )

    def sample(self, module: nn.ModuleDict, path: Path) -> dict[str, float | None]:
        """Stream a few held-out prompts causally, ask the oracle, and draw one row of frames per prompt."""
        suite = find_suite("short")
        cases = suite.cases(Options(self.config.samples))
        judges = [Strip(suite.judge(case), case.num_frames) for case in cases]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            play(self.pipeline(module), cases, judges)
        found = [judge.close() for judge in judges]
        draw_sheet(path, judges, [case.prompts[0] for case in cases])
        return {name: mean([values[name] for values in found]) for name in ATTRIBUTES}

    def export(self, module: nn.ModuleDict, folder: Path, manifest: dict) -> None:
        """A pipeline folder in bfloat16, codec included: `streamgen render --model FOLDER`."""
        pipe = self.pipeline(deepcopy(module))
        for part in (pipe.transformer, pipe.text_encoder, pipe.vae):
            for parameter in part.parameters():
                parameter.data = parameter.data.to(torch.bfloat16)
        pipe.save_pretrained(folder)
        for path in (folder / "model_index.json", folder / "tokenizer" / "tokenizer_config.json"):
            # the class's name in every release of transformers, not in the newest alone
            path.write_text(path.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
        origin = Path(self.codec) / "manifest.json"
        if origin.is_file():
            (folder / "vae" / "manifest.json").write_text(origin.read_text())
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))

