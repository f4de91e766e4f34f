"""Whatever a file is called, its adapter gets a plain name."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.library.names import MAX_LENGTH, free_name, key_of, tidy_name, typed_name


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        ("bluefire.safetensors", "bluefire"),
        ("Blue Fire (v2).SafeTensors", "Blue Fire (v2)"),
        ("../../etc/passwd", "passwd"),
        ("/etc/cron.d/x.safetensors", "x"),
        ("C:\\Windows\\win.ini", "win.ini"),
        ("..", "adapter"),
        ("", "adapter"),
        (".safetensors", "adapter"),
        (None, "None"),
        ("a\0b\nc", "a-b-c"),
        ("\uff0e\uff0e\uff0f\uff0e\uff0e\uff0fsecret", "secret"),  # full width: NFKC makes a path of it
        ("a\u2215b\u2044c", "a-b-c"),  # slashes of mathematics
        ("safe\u202estnerotes.exe", "safestnerotes.exe"),  # turns the text around
        ("<img src=x onerror=alert(1)>", "img src=x onerror=alert(1)"),
        ("🔥 Ada's fire & ice, 100 %!", "🔥 Ada's fire & ice, 100 %!"),
        ("🔥.safetensors", "🔥"),
        ("👩🏽\u200d🚀 ❤️", "👩🏽\u200d🚀 ❤️"),
        ("a\u200db🔥\u200d", "ab🔥"),  # joins nothing
        ("“Été”, 5 €", "“Été”, 5 €"),
        ("who? me: *", "who- me"),
        ("CON", "adapter-CON"),
        ("com1.safetensors", "adapter-com1"),
        ("aux.v2", "adapter-aux.v2"),
        ("火の絵", "火の絵"),
        ("x" * 5000, "x" * MAX_LENGTH),
        ("Ⅳ", "IV"),
        ("~", "adapter"),
        ("a~b", "a-b"),
    ],
)
def test_a_name_is_the_last_part_without_what_harms(raw: str | None, name: str) -> None:
    assert tidy_name(raw) == name


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        ("AC/DC", "AC-DC"),
        ("AC \\ DC", "AC - DC"),
        ("AC\uff0fDC", "AC-DC"),  # full width
        ("moss/", "moss"),
        ("a/../../x", "a-..-..-x"),
        ("../../x", "x"),
        ("/etc/cron.d/x", "x"),
        ("~/styles/x", "x"),
        ("\uff0e\uff0e\uff0fx", "x"),
        ("C:\\styles\\x.safetensors", "x"),
        ("styles/x.safetensors ", "x"),
        ("/", "adapter"),
    ],
)
def test_a_slash_in_a_typed_name_is_a_dash(raw: str, name: str) -> None:
    assert typed_name(raw) == name


@given(st.text(max_size=300) | st.text("a./\\~: ", max_size=30))
def test_a_typed_name_is_a_plain_one(raw: str) -> None:
    name = typed_name(raw)
    assert tidy_name(name) == typed_name(name) == name


@given(st.text(max_size=300))
def test_any_name_becomes_a_plain_one(raw: str) -> None:
    name = tidy_name(raw)
    assert tidy_name(name) == name
    assert 0 < len(name) <= MAX_LENGTH and len(name.encode()) <= 200
    assert not set(name) & set('/\\:*?"<>|~\0' + "".join(map(chr, range(32)))) and name.strip(" .") == name


@given(st.lists(st.text(string.ascii_letters, max_size=4)))
def test_names_in_a_library_differ_on_any_file_system(raws: list[str]) -> None:
    taken: set[str] = set()
    for raw in raws:
        name = free_name(tidy_name(raw), taken)
        assert key_of(name) not in taken and tidy_name(name) == name
        taken.add(key_of(name))


def test_long_names_that_are_taken_get_numbers() -> None:
    long = "x" * MAX_LENGTH
    assert free_name(long, {key_of(long)}) == "x" * (MAX_LENGTH - 5) + "-2"
