"""Prompt embeddings: zero padding, one meaning per text and weights, a damaged cache, UMT5 by its original names."""

import doctest
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import UMT5Config, UMT5EncoderModel

from streamgen.errors import InputError
from streamgen.models import prompts
from streamgen.models.prompts import EmbeddingCache, PromptEncoder, clean_text, load_umt5, to_original_umt5_name
from streamgen.models.text import TextEncoder, build_tokenizer

WORDS = "a red blue circle star & on moves".split()
SHORT, LONG = "a red circle", "a blue star moves on a red circle & a star"
LIMIT, WIDTH = 8, 12
EXACT = dict(rtol=0, atol=0)
FP32 = dict(rtol=1e-5, atol=1e-5)  # padding changes the sums' order
SIZES = dict(vocab_size=11, d_model=WIDTH, d_kv=4, d_ff=20, num_layers=2, num_heads=2)


def umt5(seed: int = 0, **changes) -> UMT5EncoderModel:
    torch.manual_seed(seed)
    return UMT5EncoderModel(UMT5Config(**{**SIZES, **changes})).eval()


def embedded(seed: int = 0) -> TextEncoder:
    torch.manual_seed(seed)
    return TextEncoder(vocab_size=11, dim=WIDTH, num_heads=2, max_length=LIMIT).eval()


MAKERS = {"umt5": umt5, "embedded": embedded}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(WORDS, LIMIT)


@pytest.fixture(params=MAKERS)
def make(request):
    return MAKERS[request.param]


@pytest.fixture
def cache(tmp_path) -> EmbeddingCache:
    return EmbeddingCache(tmp_path / "prompts")


def counted(encoder) -> list[int]:
    """Calls of an encoder from now on, as their numbers of tokens."""
    calls: list[int] = []
    encoder.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return calls


def refusal(call) -> str:
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- embeddings


def test_padding_is_zero_and_the_rest_is_the_encoders(make, tokenizer):
    encoder = make()
    out = PromptEncoder(tokenizer, encoder, LIMIT)([SHORT, LONG])
    assert out.shape == (2, LIMIT, WIDTH) and not out.requires_grad
    assert torch.count_nonzero(out[0, 4:]) == 0 and out[0, :4].abs().amin(1).gt(0).all()
    assert out[1].abs().sum(1).gt(0).all()  # cut, hence full
    tokens = tokenizer([SHORT, LONG], padding="max_length", truncation=True, max_length=LIMIT, return_tensors="pt")
    with torch.no_grad():
        reference = encoder(tokens["input_ids"], tokens["attention_mask"])
    reference = reference if torch.is_tensor(reference) else reference.last_hidden_state
    torch.testing.assert_close(out, reference * tokens["attention_mask"][..., None], **FP32)


def test_a_batch_is_its_prompts(make, tokenizer):
    encode = PromptEncoder(tokenizer, make(), LIMIT)
    singles = torch.cat([encode([text]) for text in (SHORT, LONG, "", SHORT)])
    torch.testing.assert_close(encode([SHORT, LONG, "", SHORT]), singles, **EXACT)
    torch.testing.assert_close(encode(SHORT), singles[:1], **EXACT)
    assert (singles[0] - singles[1]).abs().max() > 0.1
    assert "no prompt" in refusal(lambda: encode([]))


def test_a_distinct_prompt_is_encoded_once_and_without_padding(make, tokenizer):
    encoder = make()
    calls = counted(encoder)
    PromptEncoder(tokenizer, encoder, LIMIT)([SHORT, "", SHORT, LONG, ""])
    assert calls == [4, 1, LIMIT]


def test_a_prompt_over_the_limit_is_cut_and_said_so(make, tokenizer, caplog):
    encode = PromptEncoder(tokenizer, make(), LIMIT)
    encode([SHORT, "a " * (LIMIT - 1)])
    assert "the model reads" not in caplog.text
    out = encode([LONG])
    assert f"the prompt has 12 tokens, the model reads the first {LIMIT}" in caplog.text
    assert out.shape == (1, LIMIT, WIDTH)


def test_text_is_cleaned_for_umt5_only(tokenizer):
    messy = "  a red\n &amp;amp;\t circle "
    assert doctest.testmod(prompts).failed == 0 and clean_text(messy) == "a red & circle"
    encode = PromptEncoder(tokenizer, umt5(), LIMIT)
    torch.testing.assert_close(encode([messy]), encode(["a red & circle"]), **EXACT)
    encode = PromptEncoder(tokenizer, embedded(), LIMIT)
    assert (encode([messy]) - encode(["a red & circle"])).abs().max() > 0.1


def test_the_caller_chooses_the_device(make, tokenizer, cache):
    encode = PromptEncoder(tokenizer, make(), LIMIT, cache)
    for _ in range(2):  # encoded, then cached
        assert encode([SHORT], device="meta").device.type == "meta" and encode([SHORT]).device.type == "cpu"
    encode.offload("meta")
    assert all(parameter.is_meta for parameter in encode.encoder.parameters())


def test_values_that_are_not_finite_are_refused_and_not_kept(tokenizer, cache):
    encoder = umt5()
    encoder.encoder.final_layer_norm.weight.data.fill_(float("inf"))
    message = refusal(lambda: PromptEncoder(tokenizer, encoder, LIMIT, cache)([SHORT]))
    assert "bfloat16" in message and not list(cache.folder.glob("*"))


# --- the cache


def test_a_hit_gives_the_same_and_does_not_call_the_encoder(make, tokenizer, cache):
    plain = PromptEncoder(tokenizer, make(), LIMIT)([SHORT, LONG])
    encoder = make()
    calls = counted(encoder)
    encode = PromptEncoder(tokenizer, encoder, LIMIT, cache)
    torch.testing.assert_close(encode([SHORT, LONG]), plain, **EXACT)
    assert len(calls) == 2
    torch.testing.assert_close(encode([LONG, SHORT]), plain.flip(0), **EXACT)
    again = PromptEncoder(build_tokenizer(WORDS, LIMIT), encoder, LIMIT, EmbeddingCache(cache.folder))  # another run
    torch.testing.assert_close(again([SHORT]), plain[:1], **EXACT)
    assert len(calls) == 2
    encode([""])
    assert len(calls) == 3


def test_files_hold_the_rows_that_are_not_padding(tokenizer, cache):
    encode = PromptEncoder(tokenizer, umt5().bfloat16(), LIMIT, cache)
    out = encode([SHORT])
    (file,) = cache.folder.iterdir()  # and no temporary file
    torch.testing.assert_close(load_file(file)["prompt_embeds"], out[0, :4], **EXACT)
    assert out.dtype == torch.bfloat16 == encode([SHORT]).dtype


def test_whatever_changes_the_embedding_changes_the_key(make, tokenizer, cache):
    def kept() -> int:
        return len(list(cache.folder.glob("*")))

    PromptEncoder(tokenizer, make(), LIMIT, cache)([SHORT])
    PromptEncoder(tokenizer, make(), LIMIT, cache)([SHORT])
    assert kept() == 1
    others = [(tokenizer, make(seed=1), LIMIT), (tokenizer, make(), LIMIT - 1), (tokenizer, make().bfloat16(), LIMIT)]
    others.append((build_tokenizer([*WORDS[:-1], "leaps"], LIMIT), make(), LIMIT))
    if make is umt5:
        others.append((tokenizer, umt5(layer_norm_epsilon=1e-2), LIMIT))
    for number, (words, encoder, limit) in enumerate(others):
        PromptEncoder(words, encoder, limit, cache)([SHORT])
        assert kept() == 2 + number
    tuned = make()
    encode = PromptEncoder(tokenizer, tuned, LIMIT, cache)
    before = encode([SHORT])
    next(p for name, p in tuned.named_parameters() if "norm" in name).data.mul_(2)  # weights may change under a session
    assert (encode([SHORT]) - before).abs().max() > 0.01


def test_a_saved_encoder_keeps_its_key(make, tokenizer, cache, tmp_path):
    encoder = make()
    PromptEncoder(tokenizer, encoder, LIMIT, cache)([SHORT])
    encoder.save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    other = type(encoder).from_pretrained(tmp_path / "encoder")
    calls = counted(other)
    words = type(tokenizer).from_pretrained(tmp_path / "tokenizer")
    PromptEncoder(words, other, LIMIT, cache)([SHORT])
    assert not calls and len(list(cache.folder.iterdir())) == 1


@pytest.mark.parametrize("damage", ["truncated", "empty", "other", "flat"])
def test_a_damaged_file_is_ignored_and_written_again(tokenizer, cache, caplog, damage):
    encode = PromptEncoder(tokenizer, umt5(), LIMIT, cache)
    out = encode([SHORT])
    (file,) = cache.folder.iterdir()
    good = file.read_bytes()
    if damage == "flat":
        save_file({"prompt_embeds": torch.zeros(5)}, file)
    else:
        file.write_bytes({"truncated": good[:-7], "empty": b"", "other": b"not safetensors"}[damage])
    torch.testing.assert_close(encode([SHORT]), out, **EXACT)
    assert "is damaged" in caplog.text and file.read_bytes() == good


def test_a_folder_that_cannot_be_written_costs_a_warning(tokenizer, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    out = PromptEncoder(tokenizer, umt5(), LIMIT, EmbeddingCache(tmp_path / "file" / "prompts"))([SHORT])
    assert out.abs().max() > 0 and "cannot keep" in caplog.text


def test_the_default_folder_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert EmbeddingCache().folder == tmp_path / "streamgen" / "prompts" and not EmbeddingCache().folder.exists()


# --- letting go


def test_a_released_encoder_is_gone_and_cached_prompts_are_served(make, tokenizer, cache):
    encode = PromptEncoder(tokenizer, make(), LIMIT, cache)
    out = encode([SHORT])
    watch = weakref.ref(encode.encoder)
    encode.release()
    assert watch() is None and encode.encoder is None
    torch.testing.assert_close(encode([SHORT]), out, **EXACT)
    message = refusal(lambda: encode([SHORT, LONG]))
    assert "released" in message and "reload" in message
    encode.release()  # twice is fine


def test_without_an_encoder_prompts_need_reload(tokenizer):
    assert "never loaded" in refusal(lambda: PromptEncoder(tokenizer, None, LIMIT)([SHORT]))
    out = PromptEncoder(tokenizer, None, LIMIT, reload=umt5)([SHORT])
    torch.testing.assert_close(out, PromptEncoder(tokenizer, umt5(), LIMIT)([SHORT]), **EXACT)


def test_reload_brings_the_encoder_back_when_it_is_needed(make, tokenizer, cache):
    made = []
    encode = PromptEncoder(tokenizer, make(), LIMIT, cache, reload=lambda: made.append(1) or make())
    out = encode([SHORT])
    encode.release()
    torch.testing.assert_close(encode([SHORT]), out, **EXACT)
    assert not made
    torch.testing.assert_close(encode([LONG]), PromptEncoder(tokenizer, make(), LIMIT)([LONG]), **EXACT)
    encode([""])
    assert len(made) == 1 and encode.encoder is not None
    encode.release()
    encode.reload = lambda: make(seed=1)
    assert "another text encoder" in refusal(lambda: encode(["star"]))


# --- UMT5 by its original names


def original_of(model: UMT5EncoderModel) -> dict[str, torch.Tensor]:
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "encoder.embed_tokens.weight"}
    return {to_original_umt5_name(name): tensor.clone() for name, tensor in state.items()}


def original_forward(state: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """The encoder from its description, on original names; up to 8 tokens, where every distance has its own bucket."""

    def norm(x, name):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * state[f"{name}.weight"]

    x = state["token_embedding.weight"][ids]
    places = torch.arange(ids.shape[1])
    distance = places[None, :] - places[:, None]  # key - query
    bucket = distance.abs() + 16 * (distance > 0)
    for i in range(2):
        block = f"blocks.{i}"
        y = norm(x, f"{block}.norm1")
        q, k, v = (F.linear(y, state[f"{block}.attn.{n}.weight"]).unflatten(-1, (2, 4)).transpose(1, 2) for n in "qkv")
        bias = state[f"{block}.pos_embedding.embedding.weight"][bucket].permute(2, 0, 1)
        y = ((q @ k.transpose(-1, -2) + bias).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + F.linear(y, state[f"{block}.attn.o.weight"])
        y = norm(x, f"{block}.norm2")
        gate = F.gelu(F.linear(y, state[f"{block}.ffn.gate.0.weight"]), approximate="tanh")
        x = x + F.linear(gate * F.linear(y, state[f"{block}.ffn.fc1.weight"]), state[f"{block}.ffn.fc2.weight"])
    return norm(x, "norm")


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(1, 11, (2, 8), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@torch.no_grad()
def test_the_original_layout_gives_the_same_outputs(tmp_path, ids, suffix):
    model, path = umt5(), tmp_path / f"umt5{suffix}"
    (torch.save if suffix == ".pth" else save_file)(original_of(model), path)
    loaded = load_umt5(path)
    mask = (torch.arange(8) < torch.tensor([[8], [5]])).long()
    expected = model(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(loaded(input_ids=ids, attention_mask=mask).last_hidden_state, expected, **EXACT)
    torch.testing.assert_close(loaded(ids).last_hidden_state, original_forward(original_of(model), ids), **FP32)
    assert loaded.encoder.embed_tokens.weight is loaded.shared.weight and not loaded.training
    assert not any(parameter.is_meta for parameter in (*loaded.parameters(), *loaded.buffers()))
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in model.parameters())


def test_original_names_are_those_of_the_released_file():
    leaves = ["attn.k", "attn.o", "attn.q", "attn.v", "ffn.fc1", "ffn.fc2", "ffn.gate.0", "norm1", "norm2",
              "pos_embedding.embedding"]  # fmt: skip
    blocks = {f"blocks.{i}.{leaf}.weight" for i in range(2) for leaf in leaves}
    assert set(original_of(umt5())) == blocks | {"token_embedding.weight", "norm.weight"}
    for name in umt5().state_dict():
        if name != "encoder.embed_tokens.weight":
            assert prompts.to_umt5_name(to_original_umt5_name(name)) == name


@torch.no_grad()
def test_what_shapes_cannot_tell_is_given(tmp_path, ids):
    model = umt5(layer_norm_epsilon=0.1)
    torch.save(original_of(model), tmp_path / "umt5.pth")
    expected = model(ids).last_hidden_state
    loaded = load_umt5(tmp_path / "umt5.pth", {"layer_norm_epsilon": 0.1})
    torch.testing.assert_close(loaded(ids).last_hidden_state, expected, **EXACT)
    assert (load_umt5(tmp_path / "umt5.pth")(ids).last_hidden_state - expected).abs().max() > 1e-3
    message = refusal(lambda: load_umt5(tmp_path / "umt5.pth", {"layer_norm_eps": 0.1}))
    assert "did you mean 'layer_norm_epsilon'" in message


def test_transformers_names_and_dtypes_are_kept(tmp_path):
    model = umt5().bfloat16()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.save(state, tmp_path / "umt5.pth")
    loaded = load_umt5(tmp_path / "umt5.pth").state_dict()
    for name, tensor in state.items():
        assert torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype


def test_what_does_not_fit_is_listed_in_one_line(tmp_path):
    def load(state):
        torch.save(state, tmp_path / "umt5.pth")
        return refusal(lambda: load_umt5(tmp_path / "umt5.pth"))

    state = original_of(umt5())
    del state["blocks.1.attn.q.weight"], state["blocks.0.pos_embedding.embedding.weight"]
    message = load({**state, "decoder.norm.weight": torch.zeros(3)})
    assert "2 missing: blocks.0.pos_embedding.embedding.weight, blocks.1.attn.q.weight" in message
    assert "1 unexpected: decoder.norm.weight" in message and "wrong shape" not in message
    message = load({**original_of(umt5()), "blocks.1.attn.q.weight": torch.zeros(3, 3)})
    assert "1 wrong shape: blocks.1.attn.q.weight (3, 3) instead of (8, 12)" in message
    assert "not a UMT5 encoder" in load({"patch_embedding.weight": torch.zeros(3)})
    state = original_of(umt5())
    del state["token_embedding.weight"]
    assert "1 missing: token_embedding.weight" in load(state)
