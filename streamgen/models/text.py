"""The embedded model's text side: a word-level tokenizer file and a two-layer encoder trained with the transformer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

PAD, UNKNOWN, END = "[PAD]", "[UNK]", "[EOS]"


def build_tokenizer(words: Sequence[str], max_length: int):
    """A fast tokenizer over lower-cased words; unknown ones become one token, every text ends with [EOS].

    Returns: transformers.PreTrainedTokenizerFast, ready for `save_pretrained`.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate([PAD, UNKNOWN, END, *sorted(set(words))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, vocabulary[END])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=UNKNOWN, pad_token=PAD, eos_token=END, model_max_length=max_length
    )


class TextEncoder(ModelMixin, ConfigMixin):
    """Token ids -> prompt_embeds; rows of padding are exactly zero, as the Wan family expects."""

    @register_to_config
    def __init__(
        self, vocab_size: int, dim: int = 128, num_layers: int = 2, num_heads: int = 4, max_length: int = 32
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, dim)
        self.positions = nn.Parameter(torch.randn(max_length, dim) * 0.02)
        layer = nn.TransformerEncoderLayer(
            dim, num_heads, 4 * dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(dim)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids, attention_mask [B, L] -> [B, L, dim]."""
        x = self.tokens(input_ids) + self.positions[: input_ids.shape[1]]
        x = self.layers(x, src_key_padding_mask=attention_mask == 0)
        return self.norm(x) * attention_mask[..., None].to(x.dtype)
