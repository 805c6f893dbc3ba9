"""data/checkpoints.py: published weights open here with the same logits; what is damaged is named in one line."""
import json
import struct

import pytest
import torch

from data.checkpoints import CheckpointError, read_safetensors
from model import load


def tokens(l, b=2, vocab=17, seed=1):
    return torch.randint(vocab, (b, l), generator=torch.Generator().manual_seed(seed))


def random_peer(name, seed=0, **config):
    """A model of transformers with random weights, its norms and biases too."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    peer = getattr(transformers, name + "ForCausalLM")(getattr(transformers, name + "Config")(**config)).eval()
    with torch.no_grad():
        for p in peer.parameters():
            p += 0.2 * torch.randn_like(p)
    return peer


def agree(ours, peer, l=37):
    with torch.no_grad():
        want = peer(tokens(l), use_cache=False).logits
        torch.testing.assert_close(ours(tokens(l))[0], want, rtol=1e-5, atol=1e-5 * want.abs().max().item())


# Files


def test_safetensors_are_a_length_a_header_and_bytes(tmp_path):
    """The whole format, written by hand."""
    header = json.dumps({"b": {"dtype": "I64", "shape": [], "data_offsets": [6, 14]}, "__metadata__": {"format": "pt"},
                         "a": {"dtype": "BF16", "shape": [3, 1], "data_offsets": [0, 6]},
                         "c": {"dtype": "F32", "shape": [0, 2], "data_offsets": [14, 14]}}).encode()
    data = torch.tensor([1.5, -2, 3], dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes() + struct.pack("<q", -7)
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)
    found = read_safetensors(tmp_path / "x.safetensors")
    assert torch.equal(found["a"], torch.tensor([[1.5], [-2], [3]], dtype=torch.bfloat16))
    assert found["b"] == -7 and found["b"].shape == () and found["c"].shape == (0, 2) and len(found) == 3


# Peers: other programs with the same weights

LLAMA = dict(vocab_size=17, hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=29)
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}


@pytest.mark.parametrize("scaling", [None, LLAMA3])
@pytest.mark.parametrize("kv_heads, tie", [(1, False), (2, True), (4, False)])
def test_llama_opens_with_the_same_logits(kv_heads, tie, scaling, tmp_path):
    """Grouped queries, rotary scaling of Llama 3.1 (also under its older name), tied head, one file or many."""
    peer = random_peer("Llama", num_key_value_heads=kv_heads, tie_word_embeddings=tie, rope_theta=500.0,
                       rope_scaling=scaling, **LLAMA)
    peer.save_pretrained(tmp_path / "one")
    peer.save_pretrained(tmp_path / "many", max_shard_size="2KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 5
    for folder in ("one", "many"):
        ours, extra = load(tmp_path / folder)
        agree(ours, peer, 70)
        assert extra == {"layout": "llama"} and ours.config.tie == tie and ours.config.n_kv_head == kv_heads
    settings = json.loads((tmp_path / "one" / "config.json").read_text())
    rope = settings.pop("rope_parameters")
    settings |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope if scaling else None}
    (tmp_path / "one" / "config.json").write_text(json.dumps(settings))
    assert load(tmp_path / "one")[0].config == ours.config


def test_llama_without_its_config_is_refused(tmp_path):
    """No shape tells how many heads there are."""
    random_peer("Llama", **LLAMA).save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match="n_head .not in config.json"):
        load(tmp_path)
