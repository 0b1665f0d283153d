"""Anything callable as an encoder: modules stay as they were, random outputs are refused, controls are fresh copies."""

import copy
import functools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mia_utils.models import encoders, wrapping

IMAGES = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A small CNN with batch norm and dropout; ``mode`` chooses what it returns."""

    def __init__(self, mode="map"):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 8, 8), nn.BatchNorm2d(6), nn.Dropout(0.5))
        self.mode, self.config = mode, SimpleNamespace(patch_size=8)
        self.start = nn.Parameter(torch.randn(1, 5, 6))  # class token and four registers

    def forward(self, x):
        out = self.body(x)
        tokens = out.flatten(2).transpose(1, 2)
        whole = torch.cat([self.start.expand(len(x), -1, -1).to(out), tokens], 1)
        return {
            "map": out, "vector": out.mean((2, 3)), "tuple": (out.mean((2, 3)), 7),
            "dict": {"features": out.mean((2, 3))},
            "transformers": SimpleNamespace(last_hidden_state=whole, pooler_output=None),
            "pooled": SimpleNamespace(last_hidden_state=whole, pooler_output=whole[:, 0] * 2),
            "text": "road", "tokens": tokens,
        }[self.mode]  # fmt: skip


def make_net(mode="map"):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Net(mode)
    net.body[1].running_mean.normal_(generator=torch.Generator().manual_seed(1))
    return net.train()


FORMS = {
    "module": lambda net: net,
    "method": lambda net: net.forward,
    "partial": lambda net: functools.partial(net),
    "function": lambda net: lambda x: net(x),
    "object": lambda net: Runner(net),
}


class Runner:
    def __init__(self, net):
        self.net = net

    def __call__(self, x):
        return self.net(x)


@pytest.mark.parametrize("form", FORMS)
def test_a_module_behind_any_callable_runs_in_eval_mode_and_stays_as_it_was(form):
    net = make_net("vector")
    net.body[2].eval()  # a part that its owner keeps in another mode
    before, modes = copy.deepcopy(net.state_dict()), [part.training for part in net.modules()]
    encoder = encoders.wrap(FORMS[form](net), size=32, mean=(0.5,) * 3, std=(0.25,) * 3)
    with torch.inference_mode():
        got, alone = encoder.embed(IMAGES), encoder.embed(IMAGES[:1])
        assert [part.training for part in net.modules()] == modes
        assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())  # counters too
        torch.testing.assert_close(got, copy.deepcopy(net).eval()((IMAGES - 0.5) / 0.25))
    torch.testing.assert_close(alone, got[:1])
    untrained = encoders.make_untrained(encoder, seed=1)
    with torch.inference_mode():
        other = untrained.embed(IMAGES)
        assert not torch.allclose(other, got)
        assert torch.equal(other, encoders.make_untrained(encoder, seed=1).embed(IMAGES))
        assert torch.equal(encoder.embed(IMAGES), got)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert encoder.facts["normalization"][1] == "given" and encoder.facts["architecture"][0] == "Net"


def test_a_function_without_a_module_has_no_control_and_says_what_is_assumed():
    encoder = encoders.wrap(lambda x: x.flatten(1), size=32)
    assert encoders.make_untrained(encoder) is None
    assert encoder.facts.assumed == ["normalization: mean (0.0, 0.0, 0.0), std (1.0, 1.0, 1.0)"]


def test_a_module_that_can_not_be_seen_takes_the_control_away(tmp_path, monkeypatch):
    """Else the control keeps the trained backbone, and only the head is fresh."""
    text = "from torch import nn\nhead = nn.Linear(6, 2)\ndef score(x):\n    return head(x)\n"
    (tmp_path / "own_parts.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    own_parts = pytest.importorskip("own_parts")
    net, head, score = make_net("vector"), nn.Linear(6, 2), own_parts.score
    service, parts, pair = SimpleNamespace(net=net.eval()), {"backbone": net}, [net]
    for hidden in (
        lambda x: head(service.net(x)), lambda x: head(parts["backbone"](x)), lambda x: head(pair[0](x)),
        functools.partial(lambda parts, x: head(parts["backbone"](x)), parts), lambda x: own_parts.head(net(x)),
        lambda x: score(net(x)),
    ):  # fmt: skip
        encoder = encoders.wrap(hidden, size=32)
        assert encoder.embed(IMAGES).shape == (4, 2) and encoders.make_untrained(encoder) is None


def test_what_usual_closures_call_is_found():
    net, head, mean, sizes = make_net("vector"), nn.Linear(6, 2), torch.zeros(1), {"side": (32, 32)}

    @torch.inference_mode()
    def encode(x, scale=2.0):
        return net((x - mean) * scale)

    def each(x):
        return torch.cat([head(encode(part)) for part in x.split(1)])

    for function, n in (
        (lambda x: nn.functional.normalize(encode(nn.functional.interpolate(x, size=sizes["side"]))), 1),
        (encode, 1), (lambda x, net=net: torch.relu(net(x)), 1), (functools.partial(lambda model, x: model(x), net), 1),
        (each, 2),
    ):  # fmt: skip
        modules, complete = wrapping.find_modules(function)
        assert len(modules) == n and {*modules} <= {net, head} and complete
        encoder = encoders.wrap(function, size=32)
        with torch.inference_mode():
            assert not torch.allclose(encoders.make_untrained(encoder).embed(IMAGES), encoder.embed(IMAGES))


@pytest.mark.parametrize("mode", ["map", "vector", "tuple", "dict", "transformers", "pooled"])
def test_outputs_of_common_libraries_are_unpacked(mode):
    net = make_net(mode)
    encoder = encoders.wrap(net, size=32)
    net.eval()
    with torch.inference_mode():
        got = encoder.embed(IMAGES)
        out = net.body(IMAGES)
        expected = {"transformers": net.start[:, 0].expand(4, -1), "pooled": net.start[:, 0].expand(4, -1) * 2}
        torch.testing.assert_close(got, expected.get(mode, out.mean((2, 3))))
        if mode in expected:  # class token and registers are dropped
            torch.testing.assert_close(encoder.tokens(IMAGES), out.flatten(2).transpose(1, 2))
    assert encoder.offers == ({"tokens", "embed"} if mode in expected else {"embed"})


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x.mean((2, 3)) + torch.rand(len(x), 3), "two calls on the same images differ: random masking"),
        (lambda x: nn.functional.dropout(x.flatten(1)), "two calls on the same images differ"),
        (lambda x: x.mean((2, 3)) * float("nan"), "the output is not finite"),
        (lambda x: (x - x.mean(0)).flatten(1), "depends on the others of its batch"),
        (lambda x: x.mean(), "depends on the others of its batch|expected"),
        (make_net("text"), "expected a tensor, or an output with pooler_output.*got str"),
        (lambda x: {"logits": x.mean((2, 3))}, "got dict with logits: pass a function"),
        (make_net("tokens"), r"expected vectors \(N, D\), got .*: pass tokens"),
        ("model.pt", "expected embed= callable on normalized images, got str"),
    ],
)
def test_outputs_that_say_nothing_of_an_image_are_refused_in_one_line(function, message):
    with pytest.raises(ValueError, match=message) as info:
        encoders.wrap(function, size=32)
    assert "\n" not in str(info.value)


def test_dtype_and_size_of_the_module_are_followed():
    net = make_net("map").bfloat16()
    encoder = encoders.wrap(tokens=net, size=(32, 64))
    with torch.inference_mode():
        assert encoder.tokens(torch.rand(2, 3, 32, 64)).shape == (2, 32, 6)
        out = encoder.embed(IMAGES)  # square views of the attacks are brought to the module's shape
        assert out.shape == (4, 6) and out.dtype == torch.float32
        net.double()
        assert encoder.tokens(IMAGES).dtype == torch.float32
    assert encoder.input_size == 64 and encoder.shape == (32, 64)
