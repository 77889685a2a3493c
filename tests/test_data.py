import gzip

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from idx import idx_bytes, write_split

from abs_defense.data import ImageSet, _download, download_mnist, foolbox_digits, load_idx_dataset, read_idx


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("split", ["train", "test"])
def test_reads_raw_and_gzip(tmp_path, compress, split):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 28, 28))
    write_split(tmp_path, pixels, [0, 1, 2, 6, 4], prefix={"train": "train", "test": "t10k"}[split], compress=compress)
    data = load_idx_dataset(tmp_path, split)
    assert data.images.shape == (5, 1, 28, 28)
    assert data.images.dtype == torch.float32
    np.testing.assert_allclose(data.images[:, 0].numpy() * 255, pixels, atol=1e-4)
    assert data.labels.tolist() == [0, 1, 2, 6, 4]
    assert data.num_classes == 7


@given(st.lists(st.integers(0, 4), min_size=1, max_size=4), st.integers(0, 2**32 - 1))
def test_idx_round_trip(tmp_path_factory, shape, seed):
    array = np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)
    path = tmp_path_factory.mktemp("idx") / "file"
    path.write_bytes(idx_bytes(array))
    np.testing.assert_array_equal(read_idx(path), array)


@given(st.data())
def test_truncated_idx_is_refused(tmp_path_factory, data):
    raw = idx_bytes(np.arange(3 * 28 * 28).reshape(3, 28, 28) % 256)
    cut = data.draw(st.integers(0, len(raw) - 1))
    path = tmp_path_factory.mktemp("idx") / "file"
    path.write_bytes(raw[:cut])
    with pytest.raises(ValueError, match=r"not an IDX file|cut short|truncated"):
        read_idx(path)


def test_truncated_gzip_is_refused(tmp_path):
    path = tmp_path / "file.gz"
    path.write_bytes(gzip.compress(idx_bytes(np.zeros((9, 28, 28))))[:-9])
    with pytest.raises(ValueError, match="damaged gzip"):
        read_idx(path)


def test_corrupt_gzip_is_refused(tmp_path):
    raw = bytearray(gzip.compress(idx_bytes(np.random.default_rng(0).integers(0, 256, (9, 28, 28)))))
    raw[len(raw) // 2] ^= 0xFF
    path = tmp_path / "file.gz"
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="damaged gzip"):
        read_idx(path)


def test_other_idx_type_is_refused(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes([0, 0, 0x0D, 1, 0, 0, 0, 1, 0, 0, 0, 0]))
    with pytest.raises(ValueError, match="unsigned bytes"):
        read_idx(path)


def test_missing_folder_and_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no data folder"):
        load_idx_dataset(tmp_path / "nowhere")
    write_split(tmp_path, np.zeros((2, 28, 28)), [0, 1])
    (tmp_path / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match="train-labels-idx1-ubyte"):
        load_idx_dataset(tmp_path, "train")


def test_other_image_size_is_refused(tmp_path):
    write_split(tmp_path, np.zeros((2, 32, 32)), [0, 1])
    with pytest.raises(ValueError, match=r"expected images of shape \(N, 28, 28\), got \(2, 32, 32\)"):
        load_idx_dataset(tmp_path, "train")


def test_counts_must_agree(tmp_path):
    write_split(tmp_path, np.zeros((2, 28, 28)), [0, 1, 2])
    with pytest.raises(ValueError, match="2 images but 3 labels"):
        load_idx_dataset(tmp_path, "train")


def test_unknown_split(tmp_path):
    with pytest.raises(ValueError, match="'train' or 'test'"):
        load_idx_dataset(tmp_path, "validation")


def test_foolbox_digits_are_foolbox_samples():
    import foolbox as fb

    class Identity(torch.nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :10]

    model = fb.PyTorchModel(Identity().eval(), bounds=(0, 1), device="cpu")
    images, labels = fb.samples(model, dataset="mnist", batchsize=20, data_format="channels_first")
    digits = foolbox_digits()
    assert len(digits) == 20
    torch.testing.assert_close(digits.images, images, rtol=0, atol=1e-6)
    assert torch.equal(digits.labels, labels)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x, y: (x.numpy(), y), TypeError, "images: expected a torch.Tensor, got ndarray"),
        (lambda x, y: (255 * x, y), ValueError, r"images: expected values in \[0, 1\], got 0 to 255"),
        (lambda x, y: (x.where(x < 0.5, torch.nan), y), ValueError, r"images: expected values in \[0, 1\]"),
        (lambda x, y: ((255 * x).byte(), y), ValueError, "expected floating point values .* got torch.uint8"),
        (lambda x, y: (x[:, 0], y), ValueError, r"of shape \(N, 1, 28, 28\), .* of shape \(20, 28, 28\)"),
        (lambda x, y: (x, y.int()), ValueError, "labels: expected int64 .* got torch.int32"),
        (lambda x, y: (x[1:], y), ValueError, "19 images but 20 labels"),
    ],
)
def test_what_is_no_image_set(digits, change, error, message):
    with pytest.raises(error, match=message):
        ImageSet(*change(digits.images, digits.labels), "x")


def test_sha256_tells_images_apart(digits):
    other = digits.images.clone()
    other[3, 0, 14, 14] = 1.0 - other[3, 0, 14, 14].round()
    assert ImageSet(other, digits.labels, "x").sha256() != digits.sha256()
    assert ImageSet(digits.images.clone(), digits.labels, "y").sha256() == digits.sha256()


def test_download_offline_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(_download, "MIRRORS", ("http://127.0.0.1:9/",))
    with pytest.raises(ConnectionError, match=r"Without internet, put the four IDX files .*--data-dir"):
        download_mnist("test", cache=tmp_path)


def test_download_takes_the_second_mirror_and_checks_the_hash(tmp_path, monkeypatch):
    import hashlib
    import http.server
    import threading

    served = tmp_path / "served"
    write_split(served, np.zeros((2, 28, 28)), [3, 4], prefix="t10k")
    hashes = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in served.iterdir()}

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(served))

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/"
        monkeypatch.setattr(_download, "MIRRORS", ("http://127.0.0.1:9/", url))
        monkeypatch.setattr(_download, "_SHA256", hashes)
        assert download_mnist("test", cache=tmp_path / "good").labels.tolist() == [3, 4]
        monkeypatch.setattr(_download, "_SHA256", dict.fromkeys(hashes, "0" * 64))
        with pytest.raises(ConnectionError, match="hash"):
            download_mnist("test", cache=tmp_path / "bad")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
