"""Which part of the model an instruction belongs to, by the name that jax gave it."""

from llama4_jax.planning.hlo import Execution, Module


def turns_by_scope(op_name: str, axes: dict[str, int]) -> float:
    """The turns that are counted of a loop that data bound: later rounds of the experts' exchange do not happen while the
    router is balanced; a ring of attention goes all the way round; of decoding, one token is taken."""
    if "/experts/" in op_name:
        return 0.0
    return float(axes["context"]) if "/attention/" in op_name else 1.0


def origin(module: Module, run: Execution) -> str:
    """The op_name of an instruction; of one that the compiler made without, that of what it feeds, or is made of."""
    instruction, computation = run.instruction, run.computation
    for _ in range(4):
        if instruction.op_name:
            return instruction.op_name
        inner = module.called(instruction) if instruction.opcode == "fusion" else None
        if inner is not None and (names := [i.op_name for i in inner if i.op_name]):
            return names[-1]
        users = computation.users.get(instruction.name, ())
        if not users:
            return ""
        instruction = next((user for user in users if user.op_name), users[0])
    return ""


_MODULES = {"embed", "lm_head", "final_norm", "vision", "attention_norm", "ffn_norm"}


def scope_of(op_name: str) -> str:
    """The part of the model that an instruction belongs to; of the backward pass after a "d"."""
    parts = [part for part in op_name.split("/") if part]
    backward = any(part.startswith("transpose(") for part in parts)
    differentiated = backward or any(part.startswith("jvp(") for part in parts)
    found = next((part for part in parts if part in _MODULES), None)
    if "feed_forward" in parts:
        inner = parts[parts.index("feed_forward") + 1 :][:1]
        found = inner[0] if inner and inner[0] in ("experts", "router", "shared_expert") else "feed_forward"
    elif "attention" in parts:
        found = "attention"
    elif found is None and "layers" in parts:
        found = "layers, other"
    elif found is None:
        found = "head and loss" if differentiated else ("update" if parts[:1] == ["jit(train_step)"] else "other")
    return f"d {found}" if backward else found
