"""Images, weights and settings that models must refuse, each with a message that helps."""

import pickle
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from abs_defense import ABS, BinaryABS, load_model
from abs_defense.models import VAE, Calibration, Weights, fold_decoders, load_weights, save_weights


@pytest.fixture(scope="module", params=[ABS, BinaryABS])
def model(request):
    return request.param(weights=None, prototypes=8, steps=1)


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    save_weights(path, load_weights(None))
    return path


@pytest.mark.parametrize("method", ["forward", "infer", "predict_proba"])
@pytest.mark.parametrize(
    ("shape", "hint"),
    [
        ((28, 28), "without batch and channel"),
        ((5, 28, 28), "channel axis is missing"),
        ((1, 28, 28), "channel axis is missing"),
        ((5, 3, 28, 28), "colour images"),
        ((5, 28, 28, 1), "channels are last"),
        ((5, 784), "flat images"),
        ((5, 1, 32, 32), "expected shape"),
        ((5, 1, 28), "expected shape"),
        ((), "expected shape"),
    ],
)
def test_wrong_shape(model, method, shape, hint):
    with pytest.raises(ValueError, match=r"expected shape \(N, 1, 28, 28\), got .*") as caught:
        getattr(model, method)(torch.zeros(shape))
    assert hint in str(caught.value)
    assert str(tuple(shape)) in str(caught.value)


@given(st.lists(st.integers(0, 40), min_size=0, max_size=5))
def test_no_other_shape_gets_through(shape):
    model = _CHEAP
    if len(shape) == 4 and shape[1:] == [1, 28, 28]:
        shape[1] = 2
    with pytest.raises(ValueError, match="expected shape"):
        model(torch.zeros(shape))


_CHEAP = ABS(weights=None, prototypes=2, steps=0)


@given(
    bad=st.one_of(
        st.floats(min_value=1.0078125, allow_nan=False, width=32),
        st.floats(max_value=-0.0078125, allow_nan=False, width=32),
        st.just(float("nan")),
    ),
    pixel=st.integers(0, 2 * 784 - 1),
)
def test_one_bad_pixel_is_enough(bad, pixel):
    images = torch.full((2, 1, 28, 28), 0.5)
    images.view(-1)[pixel] = bad
    with pytest.raises(ValueError, match=r"expected (finite )?values in \[0, 1\]"):
        _CHEAP(images)


@pytest.mark.parametrize(
    ("low", "high", "hint"),
    [(0.0, 255.0, "divide by 255"), (-0.42, 2.8, "normalised"), (-1.0, 1.0, "normalised"), (0.0, 1.2, "to 1.2")],
)
def test_range_names_the_cause(model, low, high, hint):
    images = torch.linspace(low, high, 784).view(1, 1, 28, 28)
    with pytest.raises(ValueError, match=hint):
        model(images)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_integer_images(model, dtype):
    with pytest.raises(ValueError, match=r"floating point values in \[0, 1\], got torch\.\w+; .*float\(\) / 255"):
        model(torch.zeros(2, 1, 28, 28, dtype=dtype))


def test_numpy_images(model):
    with pytest.raises(TypeError, match=r"expected a torch\.Tensor, got ndarray"):
        model(torch.zeros(2, 1, 28, 28).numpy())


def test_rounding_just_outside_is_accepted(model):
    images = torch.full((1, 1, 28, 28), 1.0 + 1e-6)
    assert torch.isfinite(model(images)).all()


def test_wrong_input_leaves_the_model_usable(model):
    images = torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    before = model(images)
    with pytest.raises(ValueError, match="expected"):
        model(images * 255)
    torch.testing.assert_close(model(images), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("prototypes", 0),
        ("steps", -1),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("radius", -1.0),
        ("beta", -0.1),
        ("gradient", "true"),
    ],
)
def test_settings_out_of_range(setting, value):
    with pytest.raises(ValueError, match=f"{setting}: expected"):
        ABS(weights=None, **{setting: value})


def test_unknown_model():
    with pytest.raises(ValueError, match="unknown model 'resnet': expected one of abs, binary-abs, prototype-abs"):
        load_model("resnet")


@pytest.mark.parametrize("setting", ["gradient", "solver"])
def test_a_baseline_with_a_setting_that_does_not_exist(setting):
    with pytest.raises(ValueError, match=f"{setting}: expected one of .*, got 'exact'"):
        load_model("cnn", **{setting: "exact"})


def test_unknown_weights():
    with pytest.raises(FileNotFoundError, match=r"no weights at 'nowhere': expected a bundled name"):
        ABS("nowhere")


@given(st.floats(0.0, 0.999))
def test_truncated_weights(weights_file, tmp_path_factory, fraction):
    raw = weights_file.read_bytes()
    path = tmp_path_factory.mktemp("cut") / "w.safetensors"
    path.write_bytes(raw[: int(fraction * len(raw))])
    with pytest.raises(ValueError, match="damaged, truncated, or not a safetensors file"):
        load_weights(path)


def test_foreign_safetensors(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({"layer.weight": torch.zeros(3, 3)}, path)
    with pytest.raises(ValueError, match=r"expected decoders of ABS .* got format None with tensors layer\.weight"):
        load_weights(path)


def test_weights_of_another_architecture(weights_file, tmp_path):
    from safetensors import safe_open

    with safe_open(weights_file, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors["weight_1"] = tensors["weight_1"][..., :3, :3].contiguous()
    path = tmp_path / "w.safetensors"
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match=r"decoder layer 1: expected .* another architecture"):
        load_weights(path)


@pytest.mark.parametrize(
    ("field", "text", "message"),
    [("calibration", text, "calibration") for text in ("", "{", '{"alpha": 1}', '{"alpha": 1, "eta": 0, "gamma": [1]}')]
    + [
        (
            "calibration",
            f'{{"alpha": {alpha}, "eta": {eta}, "gamma": [1, {gamma}, 1]}}',
            "expected alpha and gamma above 0",
        )
        for alpha, eta, gamma in ((-1, 0, 1), (0, 0, 1), ("NaN", 0, 1), (1, -1, 1), (1, 0, 0), (1, 0, "Infinity"))
    ]
    + [("prototype_beta", text, "a prototype_beta of at least 0") for text in ("", "many", "nan", "inf", "-1")],
)
def test_weights_with_damaged_metadata(weights_file, tmp_path, field, text, message):
    from safetensors import safe_open

    with safe_open(weights_file, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    path = tmp_path / "w.safetensors"
    save_file(tensors, path, {**metadata, field: text})
    with pytest.raises(ValueError, match=message):
        load_weights(path)


def test_pickle_named_safetensors(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(pickle.dumps({"weight_0": 1}))
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_weights(path)


def _authors_folder(folder, classes=10):
    for c in range(classes):
        state = VAE().eval().state_dict()
        names = {"encoder": "Encoder", "decoder": "Decoder"}
        renamed = {names[k.split(".", 1)[0]] + "." + k.split(".", 1)[1]: v for k, v in state.items()}
        torch.save(renamed, folder / f"ABS_{c}.net")
    return folder


@pytest.fixture(scope="module")
def authors_folder(tmp_path_factory):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return _authors_folder(tmp_path_factory.mktemp("authors"))


@pytest.fixture
def authors_copy(authors_folder, tmp_path):
    return shutil.copytree(authors_folder, tmp_path / "copy")


def test_authors_folder_loads(authors_folder):
    assert load_weights(authors_folder).decoders.num_classes == 10


def test_authors_folder_with_a_missing_file(authors_copy):
    (authors_copy / "ABS_3.net").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks ABS_3\.net"):
        ABS(authors_copy)


def test_empty_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no ABS_\*\.net"):
        ABS(tmp_path)


class _Payload:
    def __reduce__(self):
        return (print, ("this code must not run",))


def test_pickle_with_code_is_not_run(authors_copy, capsys):
    with (authors_copy / "ABS_2.net").open("wb") as file:
        torch.save({"Decoder.conv_0.weight": _Payload()}, file)
    with pytest.raises(ValueError, match=r"ABS_2\.net: refused"):
        ABS(authors_copy)
    assert "must not run" not in capsys.readouterr().out


@pytest.mark.parametrize("keep", [0, 10, 5000])
def test_truncated_checkpoint(authors_copy, keep):
    path = authors_copy / "ABS_7.net"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"ABS_7\.net: (damaged|refused)"):
        ABS(authors_copy)


def test_checkpoint_of_another_model(authors_copy):
    torch.save({"fc.weight": torch.zeros(2, 2)}, authors_copy / "ABS_0.net")
    with pytest.raises(ValueError, match=r"another architecture; it lacks Decoder\.bn_0\.bias"):
        ABS(authors_copy)


def test_checkpoint_that_is_no_state_dict(authors_copy):
    torch.save(torch.zeros(3), authors_copy / "ABS_0.net")
    with pytest.raises(ValueError, match="expected a state dict, got Tensor"):
        ABS(authors_copy)


def test_checkpoints_that_differ_in_shape(authors_copy):
    with torch.random.fork_rng():
        narrow = VAE(latent_dim=4).state_dict()
    names = {"encoder": "Encoder", "decoder": "Decoder"}
    torch.save(
        {names[k.split(".", 1)[0]] + "." + k.split(".", 1)[1]: v for k, v in narrow.items()},
        authors_copy / "ABS_4.net",
    )
    with pytest.raises(ValueError, match="differ in shape"):
        ABS(authors_copy)


def test_weights_that_are_not_finite(weights_file, authors_copy, tmp_path):
    tensors = load_file(weights_file)
    tensors["weight_2"][0, 0, 0] = torch.nan
    with safe_open(weights_file, framework="pt") as file:
        save_file(tensors, tmp_path / "nan.safetensors", file.metadata())
    with pytest.raises(ValueError, match=r"nan\.safetensors: expected finite weights, got NaN or infinity in weight_2"):
        load_weights(tmp_path / "nan.safetensors")
    path = authors_copy / "ABS_3.net"
    state = torch.load(path, weights_only=True, map_location="cpu")
    state["Decoder.conv_1.bias"][0] = torch.inf
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"ABS_3\.net: expected finite weights, got NaN or infinity in conv_1\.bias"):
        load_weights(authors_copy)


def test_save_and_load_weights(tmp_path):
    with torch.random.fork_rng():
        stack = fold_decoders([VAE(latent_dim=5).eval().decoder for _ in range(3)])
    calibration = Calibration(100.0, 1e-4, (1.0, 0.9, 1.1))
    save_weights(tmp_path / "w.safetensors", Weights(stack, calibration))
    loaded = load_weights(tmp_path / "w.safetensors")
    assert loaded.calibration == calibration
    for name, value in stack.state_dict().items():
        assert torch.equal(loaded.decoders.state_dict()[name], value)
    assert ABS(tmp_path / "w.safetensors", prototypes=4, steps=1)(torch.zeros(2, 1, 28, 28)).shape == (2, 3)


def test_weights_into_a_folder_that_is_missing(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        save_weights(tmp_path / "nowhere" / "w.safetensors", load_weights(None))
