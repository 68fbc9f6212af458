"""How often ZeRO-3 gathers each weight in a micro-step: DeepSpeed's own rules, run on the model's calls.

DeepSpeed records in which order modules are called, forward and backward, and then goes by that order: a weight is
gathered before the module that owns it, others ahead of it up to `prefetch_bucket_size`, and it is released after the
module unless the order says that it is used again within `max_reuse_distance`. So the number of gathers depends on the
sizes: with the default of 1e9 a model below that keeps nearly everything from forward to backward, and the 72B decoder
keeps of a recomputed layer what its backward uses next. `_Coordinator` is
`deepspeed/runtime/zero/partitioned_param_coordinator.py` (0.19.8) without tensors; tests/test_plan.py compares its
counts with those of real steps on two ranks.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from nvlm_train.model.flops import patches_per_tile
from nvlm_train.recipe.schema import LanguageModel, Model, Recipe, Vision, lora_targets

PHASES = ("forward", "backward")  # what runs again in backward counts there


@dataclass(frozen=True)
class Tensor:
    """A parameter: the module of the recipe that it belongs to, its elements, and whether the optimizer steps it."""

    name: str
    module: str
    numel: int
    trained: bool


@dataclass(eq=False)
class Call:
    """A module: its own parameters, and the modules it calls, in order.

    recompute: its forward runs again in backward. stops_in: how far down the last modules the backward pass comes
    before it needs something of that second run: 0 the module itself, 1 its last module, and so on; None: all the way.
    """

    name: str
    tensors: list[Tensor] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    recompute: bool = False
    stops_in: int | None = None

    def walk(self) -> Iterator[Call]:
        yield self
        for call in self.calls:
            yield from call.walk()


def tensors(recipe: Recipe) -> list[Tensor]:
    """Every parameter of the recipe's model in the engine, tied ones once: names as in the model, sizes without torch.

    A replicated tower is outside the engine; `Call`s of it come from `tower_call`.
    """
    found = {tensor.name: tensor for call in _roots(recipe, 1) for each in call.walk() for tensor in each.tensors}
    return list(found.values())


# ------------------------------------------------------------------------------------------------ the model as calls


class _Maker:
    """Makes the calls of one module of the recipe: what is trained, and where adapters are."""

    def __init__(self, recipe: Recipe, module: str, prefix: str) -> None:
        self.module, self.prefix = module, prefix
        mode = recipe.train.modes[module]
        self.full = mode == "full"
        self.rank, self.targets = 0, ()  # type: int, tuple[str, ...]
        if mode == "lora":
            options = getattr(recipe.train.lora, module)
            self.rank, self.targets = options.rank, tuple(options.targets or lora_targets(recipe.model, module))

    def tensor(self, name: str, numel: int, trained: bool | None = None) -> Tensor:
        return Tensor(f"{self.prefix}.{name}", self.module, numel, self.full if trained is None else trained)

    def vector(self, name: str, width: int, bias: bool = False) -> Call:
        """A norm: its weight, and its bias if any."""
        made = [self.tensor(f"{name}.weight", width)] + [self.tensor(f"{name}.bias", width)] * bias
        return Call(name, made)

    def linear(self, name: str, inputs: int, outputs: int, bias: bool = False) -> Call:
        """A linear layer; with adapters it is three, inside peft's own."""
        if name.rsplit(".", 1)[-1] not in self.targets:
            made = [self.tensor(f"{name}.weight", inputs * outputs)] + [self.tensor(f"{name}.bias", outputs)] * bias
            return Call(name, made)
        base = [self.tensor(f"{name}.base_layer.weight", inputs * outputs)]
        base += [self.tensor(f"{name}.base_layer.bias", outputs)] * bias
        a = self.tensor(f"{name}.lora_A.default.weight", self.rank * inputs, True)
        b = self.tensor(f"{name}.lora_B.default.weight", self.rank * outputs, True)
        return Call(name, [], [Call(name, base), Call(f"{name}.lora_dropout"), Call(name, [a]), Call(name, [b])])


def _feed_forward(make: _Maker, name: str, width: int, inner: int) -> Call:
    sizes = {"gate_proj": (width, inner), "up_proj": (width, inner), "down_proj": (inner, width)}
    return Call(name, [], [make.linear(f"{name}.{part}", a, b) for part, (a, b) in sizes.items()])


def _cross_layer(make: _Maker, model: Model, number: int) -> Call:
    own, width = model.cross_attention, model.language_model.hidden_size
    heads, groups = model.cross_attention_heads
    kv, name = groups * (width // heads), f"layers.{number}"
    gates = ["attn_gate"] + ["mlp_gate"] * own.feed_forward if own.gate == "tanh" else []
    calls = [make.vector(f"{name}.memory_norm", width)] if own.memory_norm == "rms_norm" else []
    attention = {"q_proj": width, "k_proj": kv, "v_proj": kv, "o_proj": width}
    calls += [
        make.vector(f"{name}.input_layernorm", width),
        Call(name, [], [make.linear(f"{name}.attn.{part}", width, out) for part, out in attention.items()]),
    ]
    if own.feed_forward:
        calls += [
            make.vector(f"{name}.post_attention_layernorm", width),
            _feed_forward(make, f"{name}.mlp", width, model.language_model.intermediate_size),
        ]
    return Call(name, [make.tensor(f"{name}.{gate}", 1) for gate in gates], calls)


def _decoder_layer(make: _Maker, lm: LanguageModel, number: int, reader: Call | None, place: str, again: bool) -> Call:
    width, kv = lm.hidden_size, lm.num_key_value_heads * (lm.hidden_size // lm.num_attention_heads)
    name, bias = f"model.layers.{number}", lm.model_type == "qwen2"
    attention = [
        make.linear(f"{name}.self_attn.q_proj", width, width, bias),
        make.linear(f"{name}.self_attn.k_proj", width, kv, bias),
        make.linear(f"{name}.self_attn.v_proj", width, kv, bias),
        make.linear(f"{name}.self_attn.o_proj", width, width),
    ]
    calls = [
        make.vector(f"{name}.input_layernorm", width),
        Call(name, [], attention),
        make.vector(f"{name}.post_attention_layernorm", width),
        _feed_forward(make, f"{name}.mlp", width, lm.intermediate_size),
    ]
    if reader is not None:
        calls.insert({"before": 0, "between": 2, "after": 4}[place], reader)
    # the last product is where backward begins, and it needs its input; behind it, a reader's index does
    return Call(name, [], calls, again, 1 if reader is not None and place == "after" else None)


def tower_call(recipe: Recipe) -> Call:
    """One call of the vision tower."""
    vision: Vision = recipe.model.vision
    make = _Maker(recipe, "vision", "vision_model")
    width, feed, layer_norm = vision.hidden_size, vision.intermediate_size, vision.norm_type == "layer_norm"
    again = recipe.activation_checkpointing != "none"
    name = "embeddings"
    patch = [
        make.tensor(f"{name}.patch_embedding.weight", width * 3 * vision.patch_size**2),
        make.tensor(f"{name}.patch_embedding.bias", width),
    ]
    own = [
        make.tensor(f"{name}.class_embedding", width),
        make.tensor(f"{name}.position_embedding", width * (patches_per_tile(vision) + 1)),
    ]
    layers = []
    for number in range(vision.num_hidden_layers):
        name = f"encoder.layers.{number}"
        attention = [make.linear(f"{name}.attn.qkv", width, 3 * width, vision.qkv_bias)]
        if vision.qk_normalization:
            attention += [make.vector(f"{name}.attn.{part}_norm", width) for part in "qk"]
        attention.append(make.linear(f"{name}.attn.proj", width, width, True))
        mlp = [
            make.linear(f"{name}.mlp.fc1", width, feed, True),
            make.linear(f"{name}.mlp.fc2", feed, width, True),
        ]
        calls = [
            make.vector(f"{name}.norm1", width, layer_norm),
            Call(name, [], attention),
            make.vector(f"{name}.norm2", width, layer_norm),
            Call(name, [], mlp),
        ]
        # ls2 multiplies what the feed-forward part gave, and its gradient needs it
        layers.append(Call(name, [make.tensor(f"{name}.{scale}", width) for scale in ("ls1", "ls2")], calls, again, 0))
    return Call("vision_model", [], [Call("embeddings", own, [Call("patch", patch)]), Call("encoder", [], layers)])


def _roots(recipe: Recipe, chunks: int) -> list[Call]:
    """What the model calls in a micro-step: the tower inside the engine `chunks` times, projector, decoder, head."""
    model, lm = recipe.model, recipe.model.language_model
    make = _Maker(recipe, "projector", "projector")
    shuffled = 4 * model.vision.hidden_size
    calls = [make.vector("norm", shuffled, True) if model.projector.norm == "layer_norm" else Call("norm")]
    if model.architecture == "nvlm_x":
        calls.append(make.linear("fc", shuffled, lm.hidden_size))
    else:
        calls += [
            make.linear("fc1", shuffled, lm.intermediate_size),
            make.linear("fc2", lm.intermediate_size, lm.hidden_size),
        ]
    roots = [] if recipe.tower_is_replicated else [tower_call(recipe)] * chunks
    roots.append(Call("projector", [], calls))
    make = _Maker(recipe, "language_model", "language_model")
    embedding = make.tensor("model.embed_tokens.weight", lm.vocab_size * lm.hidden_size)
    readers = {}
    if model.architecture != "nvlm_d":
        of_readers = _Maker(recipe, "cross_attention", "cross_attention")
        readers = {at: _cross_layer(of_readers, model, n) for n, at in enumerate(model.cross_attention_layers)}
    again = recipe.activation_checkpointing != "none"
    layers = [
        _decoder_layer(make, lm, number, readers.get(number), model.cross_attention.place, again)
        for number in range(lm.num_hidden_layers)
    ]
    head = embedding if lm.tie_word_embeddings else make.tensor("lm_head.weight", embedding.numel)
    roots += [
        Call("embed_tokens", [embedding]),
        Call("decoder", [], [*layers, make.vector("model.norm", lm.hidden_size)]),
        Call("lm_head", [head]),
    ]
    return roots


# ------------------------------------------------------------------------------------------- what DeepSpeed does of it


class _Event(NamedTuple):
    fetch: bool  # else: release
    call: Call
    forward: bool
    again: bool = False  # of a forward pass inside the backward pass


def _events(recipe: Recipe, chunks: int) -> list[_Event]:
    """Fetches and releases of a micro-step, in order. A module whose inputs need no gradient is released at the end."""
    roots = _roots(recipe, chunks)
    needs: dict[tuple[int, int], tuple[bool, bool]] = {}  # (place in the order, call) -> gradients of input and output
    found: list[_Event] = []
    tower_trained = recipe.train.modes["vision"] != "frozen"
    gradient = False

    def forward(call: Call, path: int) -> None:
        nonlocal gradient
        before = gradient
        found.append(_Event(True, call, True))
        for each in call.calls:
            forward(each, path)
        gradient = gradient or any(tensor.trained for tensor in call.tensors)
        found.append(_Event(False, call, True))
        needs[path, id(call)] = before, gradient

    def run_again(call: Call, stop: list[Call]) -> Iterator[_Event]:
        """The second forward pass, up to the module where backward waits; `stop`: the modules it is inside of."""
        yield _Event(True, call, True, True)
        inside = bool(stop) and stop[0] is call
        for each in call.calls:
            yield from run_again(each, stop[1:] if inside and each is call.calls[-1] else [])
        if not inside:
            yield _Event(False, call, True, True)

    def backward(call: Call, path: int, started: bool = False) -> Iterator[_Event]:
        before, after = needs[path, id(call)]
        if not after:
            return
        if not started:
            yield _Event(True, call, False)
        waiting: list[Call] = [call]
        if call.recompute:
            depth = 99 if call.stops_in is None else call.stops_in
            while waiting[-1].calls and len(waiting) <= depth:
                waiting.append(waiting[-1].calls[-1])
                yield _Event(True, waiting[-1], False)
            yield from run_again(call, waiting)
        yield from children(call, path, waiting[1:])
        if before:
            yield _Event(False, call, False)

    def children(call: Call, path: int, fetched: list[Call]) -> Iterator[_Event]:
        for each in reversed(call.calls):
            if fetched and each is fetched[0]:
                yield from resume(each, path, fetched[1:])
                fetched = []
            else:
                yield from backward(each, path)

    def resume(call: Call, path: int, fetched: list[Call]) -> Iterator[_Event]:
        before, _ = needs[path, id(call)]
        yield from children(call, path, fetched)
        if before:
            yield _Event(False, call, False)

    whole = Call("model")
    found.append(_Event(True, whole, True))
    for path, root in enumerate(roots):
        if root.name == "vision_model":
            gradient = False  # pixels
            forward(root, path)
            gradient = False if not tower_trained else gradient
            continue
        if root.name == "embed_tokens":
            gradient = gradient if recipe.model.architecture != "nvlm_x" else False
        image_gradient = gradient
        if root.name == "embed_tokens" and not root.tensors[0].trained:
            gradient = False  # a frozen table is left before the images come
            forward(root, path)
            gradient = image_gradient
            continue
        forward(root, path)
    found += [_Event(False, whole, True), _Event(True, whole, False)]
    for path in reversed(range(len(roots))):
        found.extend(backward(roots[path], path))
    return found


class _Coordinator:
    """DeepSpeed's rules of one micro-step whose order is known, on numbers alone."""

    def __init__(self, order: list[Call], settings: Recipe, persistent: set[str]) -> None:
        zero = settings.zero
        self.order, self.persistent = order, persistent
        self.reuse, self.bucket, self.most = (
            zero.max_reuse_distance,
            zero.prefetch_bucket_size,
            zero.max_live_parameters,
        )
        self.hpz = zero.experimental.hpz_partition_size > 1
        self.uses: dict[str, list[int]] = {}
        self.traversed = [0]  # elements of the modules before each place of the order
        self.queue: deque[tuple[Tensor, int]] = deque()
        for place, call in enumerate(order):
            for tensor in call.tensors:
                self.uses.setdefault(tensor.name, []).append(place)
                self.queue.append((tensor, place))
            self.traversed.append(self.traversed[-1] + sum(tensor.numel for tensor in call.tensors))
        self.gathers: dict[str, Counter[str]] = {phase: Counter() for phase in PHASES}
        self.state: dict[str, str] = dict.fromkeys(persistent, "here")
        self.active: dict[str, set[int]] = {}
        self.fetched_for: dict[str, float] = {}
        self.in_backward: dict[int, Call] = {}
        self.of_recompute: dict[int, dict[str, Tensor]] = {}
        self.here = self.most_here = self.place = 0

    def _gather(self, wanted: Iterable[Tensor], state: str, event: _Event) -> None:
        phase = "forward" if event.forward and not event.again else "backward"
        for tensor in wanted:
            self.gathers[phase][tensor.name] += 1
            self.state[tensor.name] = state
            self.here += tensor.numel
        self.most_here = max(self.most_here, self.here)

    def fetch(self, event: _Event) -> None:
        call = event.call
        if not event.forward:
            self.in_backward[id(call)] = call
        self._gather([t for t in call.tensors if t.name not in self.state], "here", event)
        for tensor in call.tensors:
            self.state[tensor.name] = "here"
            self.active.setdefault(tensor.name, set()).add(id(call))
            if event.again and self.in_backward and not tensor.trained:
                owner = next(reversed(self.in_backward))
                self.of_recompute.setdefault(owner, {})[tensor.name] = tensor
                self.active[tensor.name].add(owner)
        left = {t.name for t in call.tensors if self.fetched_for.get(t.name, -1) < self.place}
        while self.queue and left:
            tensor, place = self.queue.popleft()
            self.fetched_for[tensor.name] = place
            left.discard(tensor.name)
        if self.bucket:
            room, ahead = min(self.most - self.here, self.bucket), 0
            while self.queue and ahead < room:
                tensor, place = self.queue.popleft()
                self.fetched_for[tensor.name] = max(self.fetched_for.get(tensor.name, -1), place)
                if tensor.name not in self.state:
                    self._gather([tensor], "coming", event)
                    ahead += tensor.numel
        self.place += 1

    def release(self, event: _Event) -> None:
        call = event.call
        # With hpZ the first steps' losses are compared without a backward pass; what DeepSpeed decides there, where no
        # weight is used again, it keeps for the forward passes of the whole run.
        forgets = self.hpz and event.forward and not event.again
        free = [t for t in call.tensors if t.name not in self.persistent]
        going = {t.name: t for t in free if forgets or not self._used_soon(t.name)}
        own = {t.name: t for t in call.tensors}
        if not event.forward:
            extra = self.of_recompute.pop(id(call), {})
            going |= {name: t for name, t in extra.items() if name not in self.persistent}
            own |= extra
            self.in_backward.pop(id(call), None)
        for name, tensor in own.items():
            self.active.get(name, set()).discard(id(call))
            if name in going and self.state.get(name) == "here" and not self.active.get(name):
                del self.state[name]
                self.here -= tensor.numel

    def _used_soon(self, name: str) -> bool:
        if self.fetched_for.get(name, -1) > self.place:
            return True
        uses = self.uses.get(name, [])
        following = bisect_left(uses, self.place)
        return following < len(uses) and self.traversed[uses[following]] - self.traversed[self.place] < self.reuse


@dataclass(frozen=True)
class Gathers:
    """counts: how often each tensor is gathered in each of `PHASES` of a micro-step. most: elements that are whole at
    the same time, persistent ones left out. persistent: tensors that stay whole, and are gathered once a step."""

    counts: dict[str, dict[str, int]]
    most: int
    persistent: frozenset[str]


def gathers(recipe: Recipe, chunks: int) -> Gathers:
    """What stage 3 gathers in a micro-step in which the tower inside the engine, if it is there, is called `chunks`
    times, once the order is known (from the third micro-step on; another order, such as a text-only micro-step with a
    tower inside, makes DeepSpeed forget it and learn again)."""
    small = recipe.zero.param_persistence_threshold
    persistent = {tensor.name for tensor in tensors(recipe) if tensor.numel <= small}
    events = _events(recipe, chunks)
    run = _Coordinator([event.call for event in events if event.fetch], recipe, persistent)
    for event in events:
        (run.fetch if event.fetch else run.release)(event)
    return Gathers({phase: dict(counts) for phase, counts in run.gathers.items()}, run.most_here, frozenset(persistent))
