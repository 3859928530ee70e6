"""CLIP and T5 of transformers, tiny and random, in a folder: the encoder of a network that reads texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import diffkern
from diffkern.nn import PretrainedText, PretrainedTextConfig, TextConditioned, UNet, UNetConfig

transformers = pytest.importorskip("transformers", reason="needs transformers, of the extra 'text'")
pytest.importorskip("safetensors")

TEXTS = ["three, seven", "", "thick"]
LENGTH = 7


def write_words(folder: Path) -> None:
    """A tokenizer of whole words that ends texts with </s>, id 1, and pads them with 0."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, "three": 3, "seven": 4, "thick": 5, ",": 6}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    made.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", None, [("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    whole = transformers.PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=LENGTH, **special)
    whole.save_pretrained(folder)


def clip(kind: str = "CLIPTextModel") -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"vocab_size": 8, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0, "max_position_embeddings": LENGTH}
    torch.manual_seed(0)
    return getattr(transformers, kind)(transformers.CLIPTextConfig(**sizes, **ids, projection_dim=12)).eval()


def t5() -> Any:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    torch.manual_seed(0)
    return transformers.T5EncoderModel(transformers.T5Config(vocab_size=8, **sizes)).eval()


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """As diffusers has it: encoders beside their tokenizers; T5's is in its own folder."""
    for name, model in (("text_encoder", clip()), ("text_encoder_2", clip("CLIPTextModelWithProjection"))):
        model.save_pretrained(tmp_path / name)
        write_words(tmp_path / name.replace("text_encoder", "tokenizer"))
    t5().save_pretrained(tmp_path / "t5")
    write_words(tmp_path / "t5")
    return tmp_path


def tokens_of(text: PretrainedText) -> Tensor:
    found = text.tokens(TEXTS)
    assert found.tolist() == [[3, 6, 4, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0], [5, 1, 0, 0, 0, 0, 0]]
    return found


def network(**fields: Any) -> UNet:
    torch.manual_seed(1)
    small = {"image_size": 4, "channels": 8, "multipliers": (1,), "blocks": 1, "attention_levels": (0,), "heads": 1}
    return UNet(UNetConfig(**small, classes=0, transformer_depth=1, context_channels=16, zero_init=False, **fields))


def test_clip_says_what_transformers_says(pipeline: Path) -> None:
    text = PretrainedText.from_folder(pipeline / "text_encoder", pooled=True)
    tokens, expected = tokens_of(text), clip()
    found, out = text.condition(tokens), expected(tokens)
    assert set(found) == {"context", "vector"}
    torch.testing.assert_close(found["context"], out.last_hidden_state)
    torch.testing.assert_close(found["vector"], out.pooler_output)
    assert not found["context"].requires_grad
    assert text.null.tolist() == [1, 0, 0, 0, 0, 0, 0]
    before_last = PretrainedText.from_folder(pipeline / "text_encoder", layer=-2)
    hidden = expected(tokens, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(before_last(tokens), hidden)


def test_clip_with_a_projection_gives_its_embedding_as_vector(pipeline: Path) -> None:
    text = PretrainedText.from_folder(pipeline / "text_encoder_2", pooled=True, length=5)
    tokens = text.tokens(TEXTS)
    assert tokens.shape == (3, 5)
    expected = clip("CLIPTextModelWithProjection")(tokens)
    assert text.config.vector_channels == 12
    torch.testing.assert_close(text.condition(tokens)["vector"], expected.text_embeds)


def test_t5_does_not_see_its_padding(pipeline: Path) -> None:
    text = PretrainedText.from_folder(pipeline / "t5")
    tokens = tokens_of(text)
    found = text.condition(tokens)
    assert set(found) == {"context"}
    for row, known, count in zip(found["context"], tokens, (4, 1, 2), strict=True):
        torch.testing.assert_close(row[:count], t5()(known[None, :count]).last_hidden_state[0], rtol=1e-4, atol=1e-5)
        assert (row[count:] == 0).all()
    assert torch.isfinite(text(torch.zeros(1, 3, dtype=torch.int64))).all()
    half = PretrainedText.from_folder(pipeline / "t5", dtype="bfloat16")
    assert half(tokens).dtype == torch.bfloat16


@pytest.mark.parametrize(("name", "pooled"), [("text_encoder", True), ("text_encoder_2", True), ("t5", False)])
def test_it_goes_the_way_of_every_encoder(pipeline: Path, name: str, pooled: bool, tmp_path: Path) -> None:
    text = PretrainedText.from_folder(pipeline / name, pooled=pooled)
    unet = network(vector_channels=text.config.vector_channels)
    model = TextConditioned.of(unet, text)
    x, t, tokens = torch.randn(3, 1, 4, 4), torch.tensor([1.0, 5.0, 9.0]), model.tokens(TEXTS)
    torch.testing.assert_close(model(x, t, tokens), unet(x, t, text.condition(tokens)))
    # Its weights are none of the model's: not trained, not averaged, not stored.
    assert {id(p) for p in model.parameters()} == {id(p) for p in unet.parameters()}
    assert not any("text" in key for key in model.state_dict())
    diffusion = diffkern.Diffusion(model, diffkern.cosine(20), drop=0.5)
    assert diffusion.null is not None
    assert diffusion.null.equal(text.null)
    diffusion.loss(x, cond=tokens, seeds=0).backward()
    assert all(p.grad is not None for p in unet.parameters())
    diffusion.save_pretrained(tmp_path / "saved")
    again = diffkern.Diffusion.from_pretrained(tmp_path / "saved")
    options: dict[str, Any] = {"steps": 3, "seeds": 0, "guidance": 2.0}
    found = again.sample(3, "ddim", cond=again.model.tokens(TEXTS), **options)
    assert found.equal(diffusion.sample(3, "ddim", cond=tokens, **options))
    # The same by hand: contexts of the network inside, guided by those of the empty text, in two calls a step.
    plain = diffkern.Diffusion(unet, diffkern.cosine(20))
    bare = plain.sample(3, "ddim", steps=3, seeds=0, cond=text.condition(tokens))
    torch.testing.assert_close(diffusion.sample(3, "ddim", steps=3, seeds=0, cond=tokens), bare)


def test_what_is_no_encoder_is_one_sentence(pipeline: Path) -> None:
    folder = pipeline / "t5"
    with pytest.raises(FileNotFoundError, match=r"there is no config.json in .*nowhere, which transformers' save_pret"):
        PretrainedText.from_folder(pipeline / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"there is no tokenizer_config.json in .*text_encoder, which"):
        PretrainedText.from_folder(pipeline / "text_encoder", pipeline / "text_encoder")
    with pytest.raises(ValueError, match=r"PretrainedTextConfig.vector_channels must be 0 for T5, which has no vector"):
        PretrainedText.from_folder(folder, pooled=True)
    with pytest.raises(ValueError, match=r"PretrainedTextConfig.layer must be negative, counted from the last, got 0"):
        PretrainedText.from_folder(folder, layer=0)
    with pytest.raises(ValueError, match=r"PretrainedTextConfig.length must lie in 1..4096, got 0"):
        PretrainedText.from_folder(folder, length=0)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["BertModel"]}))
    with pytest.raises(ValueError, match=r"folder must have one of CLIPModel, .*, got 'BertModel' in "):
        PretrainedText.from_folder(folder)
    with pytest.raises(ValueError, match=r"TextConditionedConfig.network must have vector_channels = 16, those of"):
        TextConditioned.of(network(), PretrainedText.from_folder(pipeline / "text_encoder", pooled=True))


def test_pickled_weights_are_not_read(pipeline: Path) -> None:
    folder = pipeline / "text_encoder"
    (folder / "model.safetensors").unlink()
    torch.save(clip().state_dict(), folder / "pytorch_model.bin")
    text = PretrainedText.from_folder(folder)
    with pytest.raises(ValueError, match="folder must have the weights of CLIPTextModel as safetensors, got"):
        text(text.tokens(TEXTS))


def test_the_configuration_is_plain_data() -> None:
    config = PretrainedTextConfig("a", "b", "T5EncoderModel", 16)
    assert PretrainedTextConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match=r"PretrainedTextConfig.model must be one of 'CLIPTextModel'"):
        PretrainedTextConfig.from_dict({**config.to_dict(), "model": "BertModel"})
    with pytest.raises(ValueError, match=r"PretrainedTextConfig.context_channels must lie in 1..1048576, got 0"):
        PretrainedTextConfig("a", "b", "T5EncoderModel", 0)
