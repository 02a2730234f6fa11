from pathlib import Path

from safetensors.torch import load_file

from sslvision.nn.position import sincos_position

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "sincos.safetensors")


def test_sine_cosine_positions_equal_the_authors_with_a_class_row():
    assert (sincos_position(192, (7, 7), num_prefix=1)[0] - GOLDEN["dim192_grid7_cls"]).abs().max() <= 1e-6


def test_sine_cosine_positions_equal_the_authors_without_a_class_row():
    assert (sincos_position(64, (14, 14))[0] - GOLDEN["dim64_grid14"]).abs().max() <= 1e-6


def test_columns_are_encoded_in_the_first_half_and_rows_in_the_second():
    table = sincos_position(8, (2, 3))[0].view(2, 3, 8)
    assert (table[0, :, :4] == table[1, :, :4]).all()
    assert (table[:, 0, 4:] == table[:, 2, 4:]).all()
    assert (table[0, 0] != table[1, 2]).any()
