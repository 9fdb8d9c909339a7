"""How a text came to be: its masks as blocks, and a page that replays the unmasking, to open in any
browser, offline. sample.py --trace writes that page alone, report.py puts it into a report."""
import json
from pathlib import Path

from configurator import UserError, first_line


def text_after(tokenizer, ids, before=None):
    """The text of ids after those before, by default a word: some tokenizers drop a first space."""
    if before is None:
        before = tokenizer.encode("a", add_special_tokens=False)
    return tokenizer.decode(before + ids)[len(tokenizer.decode(before)):]


def text_with_masks(tokenizer, ids, mask_id):
    """The text of ids (T,), each mask as one block character."""
    text, part = "", []
    for token in [*ids, mask_id]:
        if token != mask_id:
            part.append(token)
            continue
        text += (text_after(tokenizer, part) if text else tokenizer.decode(part)) + "\u2591"
        part = []
    return text[:-1]


def trace_page(frames, tokenizer, mask_id):
    """The page that replays frames, [(ids, confidence)], the first before any pass."""
    tokens, rows, set_at, before = {}, [], {}, []
    for n, (ids, confidence) in enumerate(frames):
        row = []
        for i, token in enumerate(ids):
            if token == mask_id:
                set_at.pop(i, None)
                row.append([-1, 0, 0])
                continue
            if n and i not in set_at and (i >= len(before) or before[i] == mask_id):
                set_at[i] = [n, round(confidence[i], 3)]
            row.append([tokens.setdefault(token, len(tokens)), *set_at.get(i, [0, 0])])
        rows.append(row)
        before = ids
    texts = [text_after(tokenizer, [token]) for token in tokens]
    data = json.dumps({"tokens": texts, "frames": rows}).replace("<", "\\u003c")
    page = (Path(__file__).parent / "assets/trace.html").read_text(encoding="utf-8")
    return page.replace("<script>", f"<script>const DATA={data}\n")


def write_trace(path, frames, tokenizer, mask_id):
    """Write trace_page() to a file; UserError if that cannot be."""
    try:
        Path(path).write_text(trace_page(frames, tokenizer, mask_id), encoding="utf-8")
    except OSError as error:
        raise UserError(f"trace: '{path}' cannot be written: {first_line(error)}") from None
