"""The code of a response: blocks as models write them, and texts made to keep the search busy."""

import pytest

from experiments.tasks.code.blocks import extract_code, fenced

DOC = '"""'


@pytest.mark.parametrize(
    ("response", "code"),
    [
        ("print(1)", "print(1)"),
        ("a\n```python\nb\n```\nc", "b"),
        ("```python\r\nb\r\n```\r\n", "b"),
        ("```python\na\n```\n```python\nb\nc\n```", "b\nc"),
        ("```py\na\n```\n```python3\nb\n```", "b"),
        ("  ```Python\n  a\n  ```", "a"),
        ("```python\na\n```\n```\nb\n```", "a"),
        ("```python\ncut of", "cut of"),
        ("```python\n```", ""),
        ("```\na\n```", "a"),
        ("``` ```python x", "``` ```python x"),
        ("", ""),
        ("1. So:\n\n   ```python\n   if a:\n       b\n   ```\n2. Done", "if a:\n    b"),
        ("- ```python\n  a\n  ```", "a"),
        ("````python\na\n```\nb\n````", "a\n```\nb"),
        ("~~~python\na\n~~~", "a"),
        ("~~~~ python\na = '~~~'\n~~~~", "a = '~~~'"),
        (
            f"```python\ndef f():\n    {DOC}\n    ```\n    f()\n    ```\n    {DOC}\n    return 1\n```\nx",
            f"def f():\n    {DOC}\n    ```\n    f()\n    ```\n    {DOC}\n    return 1",
        ),
        (f"```python\n{DOC}\n```\nf()\n```\n{DOC}\na\n```\nx", f"{DOC}\n```\nf()\n```\n{DOC}\na"),
        (f"```python\n{DOC}\n```python\nf()\n```\n{DOC}\na\n```\nx", f"{DOC}\n```python\nf()\n```\n{DOC}\na"),
        (f"```python\n{DOC}\n```\n{DOC}\na\n```\nx", f"{DOC}\n```\n{DOC}\na"),
        (
            f"```python\nx = {DOC}broken\n```\nFixed:\n```python\n{DOC}doc{DOC}\nprint(1)\n```",
            f"{DOC}doc{DOC}\nprint(1)",
        ),
        ("```python\nprint(1)```", "print(1)"),
        ("```python\nprint(1)```\nIt prints.\n```python\nprint(2) ```\n", "print(2) "),
        ("```python\nprint(1)  # one```\nDone.", "print(1)  # one"),
        ("```python\na  # no ```\nb\n```\nDone.", "a  # no ```\nb"),
        ("```python\na = '```'\nb = '''```'''\nc\n```\nDone.", "a = '```'\nb = '''```'''\nc"),
        ("Code: ```python\na\n```", "a"),
        (
            f"def f():\n    {DOC}\n    ```\n    f()\n    ```\n    {DOC}\n    return 1",
            f"def f():\n    {DOC}\n    ```\n    f()\n    ```\n    {DOC}\n    return 1",
        ),
        (f"{DOC}\n```python\nf()\n```\n{DOC}\na", f"{DOC}\n```python\nf()\n```\n{DOC}\na"),
        (f"Write {DOC} around it:\n```python\n{DOC}doc{DOC}\na\n```\n", f"{DOC}doc{DOC}\na"),
        (f"A {DOC}quotation{DOC}:\n```\na\n```\n", "a"),
        ("**Code:** ```python3\na\n```", "a"),
        (
            "```python\na = '```python\\n' + b\n# ends with ```python\nc\n```",
            "a = '```python\\n' + b\n# ends with ```python\nc",
        ),
        ("```python3.11\na\n```\n``` {.python .numberLines}\nb\n```\n```pycon\n>>> c\n```", "b"),
        ("```python\na\n``` This prints 1.\n```python\nb\n```\n", "b"),
        ("```python\na\n``` This prints 1.\n", "a"),
        ("```json\n{}\n```\n```\na\n```\n```text\n1\n```", "a"),
        ('```python title="x"\na\n```', "a"),
        ("```json\n{}\n```", "```json\n{}\n```"),
        ("````markdown\n```python\na\n```\n````", "a"),
        ("```text\n1\n```python\na\n```", "a"),
        ("```python\na\n```python\nb\n```", "b"),
        ("```python\n\n    a\n    b\n```", "\na\nb"),
        ("```\nprint(1)", "print(1)"),
        ("```python\n# it's\ndon't = 1\n```\nx", "# it's\ndon't = 1"),
        ("\t```python\n\tif a:\n\t\tb\n\t```", "if a:\n\tb"),
    ],
)
def test_the_code_is_the_last_block_of_python_or_the_last_without_a_language_or_everything(response, code):
    assert extract_code(response) == code


@pytest.mark.parametrize(
    "code", ["print(1)", "a = '''\n```\n'''", f"{DOC}\n````text\n{DOC}\nb", "# ```", "", "\n\na\n"]
)
def test_code_comes_back_out_of_its_fence(code):
    assert extract_code(f"So:\n{fenced(code)}\nDone.") == code


def test_no_response_keeps_the_search_busy():
    """Each would take minutes if any part of it were searched again for every line."""
    unit = "```python\n"
    for hostile in (
        unit,
        unit + "'''\n```\n",
        "a```\n",
        '\\"""\n',
        '"\\"',
        "`",
        "- ",
        "x `",
        " ",
    ):
        for begin in ("", unit):
            assert isinstance(extract_code(begin + hostile * 20_000), str)
