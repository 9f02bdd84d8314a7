"""A Llama in a hundred lines, for training: the exported folder loads as `LlamaForCausalLM`."""

import json
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn


@dataclass
class Shape:
    """The sizes of the model."""

    vocabulary: int = 2048
    hidden: int = 192
    layers: int = 6
    feed_forward: int = 512
    heads: int = 6
    kv_heads: int = 2
    positions: int = 2048
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5

    @property
    def head(self):
        """Values of one attention head."""
        return self.hidden // self.heads


def rms_norm(x, weight, eps):
    """RMSNorm in f32."""
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def rotate(x, cos, sin):
    """Rotary positions, halves as in Llama."""
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


class Block(nn.Module):
    """Attention and SwiGLU, each behind a norm."""

    def __init__(self, shape):
        super().__init__()
        self.shape = shape
        self.attention_norm = nn.Parameter(torch.ones(shape.hidden))
        self.mlp_norm = nn.Parameter(torch.ones(shape.hidden))
        heads = shape.heads + 2 * shape.kv_heads
        self.qkv = nn.Linear(shape.hidden, heads * shape.head, bias=False)
        self.output = nn.Linear(shape.heads * shape.head, shape.hidden, bias=False)
        self.gate_up = nn.Linear(shape.hidden, 2 * shape.feed_forward, bias=False)
        self.down = nn.Linear(shape.feed_forward, shape.hidden, bias=False)

    def forward(self, x, cos, sin):
        """[batch, length, hidden] to the same."""
        shape = self.shape
        batch, length, _ = x.shape
        qkv = self.qkv(rms_norm(x, self.attention_norm, shape.norm_eps))
        qkv = qkv.view(batch, length, -1, shape.head).transpose(1, 2)
        q, k, v = qkv.split([shape.heads, shape.kv_heads, shape.kv_heads], 1)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        group = shape.heads // shape.kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        attended = F.scaled_dot_product_attention(q, k, v.contiguous(), is_causal=True)
        x = x + self.output(attended.transpose(1, 2).reshape(batch, length, -1))
        gate, up = self.gate_up(rms_norm(x, self.mlp_norm, shape.norm_eps)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Model(nn.Module):
    """The whole model; the embedding is the output head too."""

    def __init__(self, shape):
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocabulary, shape.hidden)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.Parameter(torch.ones(shape.hidden))
        self.initialise()
        frequencies = shape.rope_theta ** (-torch.arange(0, shape.head, 2).float() / shape.head)
        angles = torch.arange(shape.positions).float()[:, None] * frequencies
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    @torch.no_grad()
    def initialise(self, embedding_std=0.05, copy_strength=0.15):
        """A copy-friendly start.

        The rows of V are orthonormal and the output projection is its transpose, scaled: a head that
        looks at a token raises that same token at once, as the embeddings are tied. MLP outputs are 0.
        """
        shape = self.shape
        for matrix in (p for p in self.parameters() if p.dim() == 2):
            nn.init.normal_(matrix, std=0.8 / math.sqrt(matrix.shape[1]))
        nn.init.normal_(self.embedding.weight, std=embedding_std)
        kv = shape.kv_heads * shape.head
        for block in self.blocks:
            nn.init.zeros_(block.down.weight)
            orthonormal = torch.linalg.qr(torch.randn(shape.hidden, shape.hidden))[0]
            value = orthonormal[:kv]
            block.qkv.weight[-kv:] = value
            for head in range(shape.heads):
                kv_head = head // (shape.heads // shape.kv_heads)
                rows = value[kv_head * shape.head:(kv_head + 1) * shape.head]
                columns = slice(head * shape.head, (head + 1) * shape.head)
                block.output.weight[:, columns] = copy_strength * rows.t()

    def logits(self, tokens):
        """[batch, length] ids to [batch, length, vocabulary]."""
        length = tokens.shape[1]
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos[:length], self.sin[:length])
        return rms_norm(x, self.norm, self.shape.norm_eps) @ self.embedding.weight.t()

    def forward(self, tokens, targets):
        """The mean cross-entropy."""
        logits = self.logits(tokens).reshape(-1, self.shape.vocabulary)
        return F.cross_entropy(logits.float(), targets.reshape(-1))

    def export(self, folder):
        """Writes config.json and model.safetensors in bf16."""
        shape = self.shape
        tensors = {"model.embed_tokens.weight": self.embedding.weight, "model.norm.weight": self.norm}
        for index, block in enumerate(self.blocks):
            kv = shape.kv_heads * shape.head
            q, k, v = block.qkv.weight.split([shape.heads * shape.head, kv, kv])
            gate, up = block.gate_up.weight.chunk(2)
            layer = {
                "input_layernorm": block.attention_norm,
                "post_attention_layernorm": block.mlp_norm,
                "self_attn.q_proj": q,
                "self_attn.k_proj": k,
                "self_attn.v_proj": v,
                "self_attn.o_proj": block.output.weight,
                "mlp.gate_proj": gate,
                "mlp.up_proj": up,
                "mlp.down_proj": block.down.weight,
            }
            tensors.update({f"model.layers.{index}.{name}.weight": t for name, t in layer.items()})
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: t.detach().to(torch.bfloat16).contiguous().clone() for name, t in tensors.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(self.config(), indent=1))

    def config(self):
        """config.json."""
        shape = self.shape
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": shape.vocabulary,
            "hidden_size": shape.hidden,
            "intermediate_size": shape.feed_forward,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.head,
            "max_position_embeddings": shape.positions,
            "rope_theta": shape.rope_theta,
            "rms_norm_eps": shape.norm_eps,
            "hidden_act": "silu",
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "bos_token_id": None,
            "eos_token_id": [0, 2],
            "pad_token_id": 3,
            "attention_bias": False,
            "mlp_bias": False,
        }
