"""Hugging Face's names for the tensors of a decoder, and the place of each among our parameters.

One list serves all families. A family names only the few tensors that it calls otherwise.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from models.config import TransformerConfig
from models.hugging_face.tensors import Path, Piece, Plan, Within


@dataclass(frozen=True)
class Names:
    """Names of the tensors that differ between families."""

    router: str = "mlp.gate"
    experts: str = "mlp.experts"
    gate_up_down: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    """Names of the three matrices of an expert."""
    experts_together: bool = False
    """If true, one tensor holds a matrix of all experts of a layer, with gates and ups interleaved (gpt-oss)."""
    shared: str = "mlp.shared_expert"


def plan_of(config: TransformerConfig, names: Names) -> Plan:
    """Return, for each parameter of a model, the tensors that make it up."""
    plan: dict[Path, list[Piece]] = {
        ("embedding",): [Piece("model.embed_tokens.weight")],
        ("final_norm", "scale"): [Piece("model.norm.weight")],
    }
    if not config.tie_embeddings:
        plan[("head",)] = [Piece("lm_head.weight", "V D -> D V")]
    for stack in config.stacks:
        # Every layer of the stack has the same tensors, which take its place on the axis of layers.
        pieces = [
            (("attention_norm", "scale"), Piece("input_layernorm.weight")),
            (("moe_norm", "scale"), Piece("post_attention_layernorm.weight")),
            *(_attention(config) if config.latent is None else _latent_attention(config)),
            *(_mixture(config, names) if stack.sparse else _feed_forward("mlp", ("dense",))),
        ]
        for place in range(stack.length):
            for path, piece in pieces:
                name = f"model.layers.{stack.first + place}.{piece.name}"
                of_layer = Piece(name, piece.axes, (place, *piece.at), piece.within)
                plan.setdefault((stack.name, *path), []).append(of_layer)
    return plan


def _attention(config: TransformerConfig) -> Iterator[tuple[Path, Piece]]:
    for ours, theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        yield ("attention", ours), Piece(f"self_attn.{theirs}.weight", "(N H) D -> D N H")
        if config.attention_bias != "none":
            yield ("attention", f"{ours}_bias"), Piece(f"self_attn.{theirs}.bias", "(N H) -> N H")
    yield ("attention", "output"), Piece("self_attn.o_proj.weight", "D (N H) -> N H D")
    if config.attention_bias == "all":
        yield ("attention", "output_bias"), Piece("self_attn.o_proj.bias")
    if config.query_key_norm != "none":
        axes = "(N H) -> N H" if config.query_key_norm == "projection" else ""
        yield ("attention", "query_norm", "scale"), Piece("self_attn.q_norm.weight", axes)
        yield ("attention", "key_norm", "scale"), Piece("self_attn.k_norm.weight", axes)
    if config.attention_sinks:
        yield ("attention", "sinks"), Piece("self_attn.sinks")


def _latent_attention(config: TransformerConfig) -> Iterator[tuple[Path, Piece]]:
    latent = config.latent
    assert latent is not None
    query = "q_b_proj" if latent.query_rank else "q_proj"
    yield ("attention", "query"), Piece(f"self_attn.{query}.weight", "(N H) D -> D N H")
    if latent.query_rank:
        yield ("attention", "query_latent"), Piece("self_attn.q_a_proj.weight", "Q D -> D Q")
        yield ("attention", "query_latent_norm", "scale"), Piece("self_attn.q_a_layernorm.weight")
    yield ("attention", "latent"), Piece("self_attn.kv_a_proj_with_mqa.weight", "C D -> D C")
    yield ("attention", "latent_norm", "scale"), Piece("self_attn.kv_a_layernorm.weight")
    whole = latent.plain_dim + latent.value_dim
    for ours, start in (("key", 0), ("value", latent.plain_dim)):
        within = {"H": Within(start, whole)}
        yield ("attention", ours), Piece("self_attn.kv_b_proj.weight", "(N H) C -> C N H", within=within)
    yield ("attention", "output"), Piece("self_attn.o_proj.weight", "D (N H) -> N H D")


def _feed_forward(name: str, path: Path) -> Iterator[tuple[Path, Piece]]:
    for number, theirs in enumerate(("gate_proj", "up_proj")):
        yield (*path, "gate_up"), Piece(f"{name}.{theirs}.weight", "F D -> D F", at=(None, number))
    yield (*path, "down"), Piece(f"{name}.down_proj.weight", "D F -> F D")


def _mixture(config: TransformerConfig, names: Names) -> Iterator[tuple[Path, Piece]]:
    yield ("moe", "router"), Piece(f"{names.router}.weight", "E D -> D E")
    if config.router_bias:
        yield ("moe", "router_bias"), Piece(f"{names.router}.bias")
    if config.router == "sigmoid":
        yield ("moe", "correction_bias"), Piece(f"{names.router}.e_score_correction_bias")
    if names.experts_together:
        yield ("moe", "gate_up"), Piece(f"{names.experts}.gate_up_proj", "E D (F G) -> E D G F")
        yield ("moe", "gate_up_bias"), Piece(f"{names.experts}.gate_up_proj_bias", "E (F G) -> E G F")
        yield ("moe", "down"), Piece(f"{names.experts}.down_proj")
        yield ("moe", "down_bias"), Piece(f"{names.experts}.down_proj_bias")
    else:
        for expert in range(config.num_experts):
            gate, up, down = (f"{names.experts}.{expert}.{name}.weight" for name in names.gate_up_down)
            yield ("moe", "gate_up"), Piece(gate, "F D -> D F", at=(expert, None, 0))
            yield ("moe", "gate_up"), Piece(up, "F D -> D F", at=(expert, None, 1))
            yield ("moe", "down"), Piece(down, "D F -> F D", at=(expert,))
    if config.shared_expert_size:
        yield from _feed_forward(names.shared, ("moe", "shared"))
    if config.gate_shared_expert:
        yield ("moe", "shared_gate"), Piece(f"{names.shared}_gate.weight", "1 D -> D")
