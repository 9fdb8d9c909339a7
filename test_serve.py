"""Tests of sample.py --serve: a server of random models, asked as a browser would and as it should
not be; its texts and figures against sample.py --json."""
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

import model_files
import serve
from test_convert import (  # noqa: F401  the fixture is used by its name
    HERE, cases, check_error, diffusion, random_lm, sample_main, save_final)

LONG = {"max_new_tokens": 900, "steps": 900, "temperature": 1, "seed": 5}  # for many seconds


@contextmanager
def server_of(folder, *flags):
    """A running server of the model in a folder: the process, its port in .port."""
    process = subprocess.Popen(
        [sys.executable, HERE / "sample.py", "--serve", "--port=0", f"--out_dir={folder}",
         "--device=cpu", *flags], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    try:
        said = process.stdout.readline()
        assert "Ctrl-C ends it" in said, said + process.stderr.read()
        process.port = int(re.search(r"http://127\.0\.0\.1:(\d+) ", said)[1])
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of a whole-sequence model, which chats, and of a block model, random ones."""
    out = tmp_path_factory.mktemp("serve")
    lm = random_lm("llama", vocab_size=300, max_position_embeddings=1024)
    save_final(out / "whole/final", diffusion(lm, "linear", 10))
    (out / "whole/final/chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>")
    save_final(out / "block/final")
    return out


@pytest.fixture(scope="module")
def servers(runs):
    """Servers of both, with which sample.py's flags become the settings of the page."""
    with server_of(runs / "whole", "--prompt=Hello") as whole:
        with server_of(runs / "block", "--stop_at_eos=false", "--branches=3") as block:
            yield {"whole": whole, "block": block}


def ask(server, body=None, method=None, path=None, **headers):
    """(status, headers, text) of a request; a body is given as JSON or as it is."""
    if isinstance(body, dict):
        body = json.dumps(body)
    client = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    default = "POST" if body is not None else "GET"
    path = path or ("/generate" if body is not None else "/")
    given = {"Content-Type": "application/json"} if body is not None else {}
    client.request(method or default, path, body, given | headers)
    reply = client.getresponse()
    text = reply.read().decode()
    client.close()
    return reply.status, reply.headers, text


def generated(server, **asked):
    """The events of a text by mode: {mode: [events]}; the last of all is an end."""
    status, _, text = ask(server, asked)
    assert status == 200, text
    *events, end = map(json.loads, text.splitlines())
    assert end == {"event": "end"}
    return {mode: [event for event in events if event["mode"] == mode]
            for mode in dict.fromkeys(event["mode"] for event in events)}


def shown(events):
    """The text of each new token as the passes of a mode show it at last, None for a mask."""
    cells = [None] * sum(events[0]["holes"])
    for event in events[1:-1]:
        assert event["event"] == "pass"
        for i, text, *sure in event["set"]:
            assert all(0 <= x <= 1 for x in sure)
            cells[i] = text
    return cells


# --------------------------------------------------------------------------------------------------
# Texts
def test_a_token_has_its_text_and_bytes_of_one_character_share_it():
    tokenizer = model_files.byte_tokenizer()
    ids = tokenizer.encode("né€🙂", add_special_tokens=False)

    def text_of(row):
        return serve.pieces(lambda x: tokenizer.decode(list(x)), row, 300)

    assert text_of(ids) == ["n", "é", "", "€", "", "", "🙂", "", "", ""]
    assert text_of([ids[0], 300, *ids[1:3]]) == ["n", None, "é", ""]
    assert text_of([*ids[1:2], 300, *ids[2:3]]) == ["\ufffd", None, "\ufffd"]
    assert text_of([*ids[1:2], ids[0]]) == ["\ufffdn", ""]


@cases("kind, flags", [
    ("whole", "--steps=5"), ("whole", "--threshold=0.02 --temperature=0.7 --seed=3"),
    ("whole", "--steps=9 --remask=4 --order=margin"), ("whole", "--chat --order=random"),
    ("block", "--steps=6 --temperature=1 --top_k=9"), ("block", "--order=left_to_right --steps=30"),
    ("block", "--verify --drafts=2 --branches=3"),
    ("block", "--verify --drafts=3 --branches=3 --temperature=1 --seed=9")])
def test_texts_and_figures_are_those_of_sample_py(servers, runs, sample_main, kind, flags):
    flags = ["--max_new_tokens=20", "--prompt=The [", *flags.split()]
    asked = dict(flag[2:].split("=") for flag in flags if "=" in flag and "branch" not in flag)
    asked = {name: value if name in ("prompt", "order") else json.loads(value)
             for name, value in asked.items()} | {"chat": "--chat" in flags}
    code, out, err = sample_main("--json", "--device=cpu", f"--out_dir={runs / kind}",
                                 f"--stop_at_eos={kind == 'whole'}", *flags)
    assert code == 0, err
    wanted = json.loads(out)
    mode = "verified" if "--verify" in flags else "diffusion"
    [(_, events)] = generated(servers[kind], modes=[mode], **asked).items()

    done, cells = events[-1], shown(events)
    for name in ("text", "token_ids", "tokens", "forwards", "tokens_per_forward"):
        assert done[name] == wanted[name], name
    assert events[0]["parts"] == ["" if asked["chat"] else "The ["]
    assert "".join(cells[:done["tokens"]]) == done["text"]
    assert events[-2]["forwards"] == done["forwards"]
    assert done["seconds"] >= events[-2]["seconds"] and done["tokens_per_s"] > 0
    if mode == "verified":
        assert wanted["accepted_per_check"] == round(done["accepted"] / done["checks"], 3)


@cases("temperature", [0, 1])
def test_the_ar_model_stands_beside_and_verified_decoding_writes_its_text(servers, temperature):
    modes = generated(servers["block"], max_new_tokens=20, temperature=temperature)
    assert list(modes) == ["diffusion", "verified", "ar"]
    ar, verified = modes["ar"], modes["verified"]
    assert ar[-1]["token_ids"] == verified[-1]["token_ids"]
    assert ar[-1]["forwards"] == len(ar) - 2 == 20 and ar[-1]["tokens_per_forward"] == 1
    assert verified[-1]["forwards"] == len(verified) - 2 and shown(verified) == shown(ar)
    for events in generated(servers["block"], max_new_tokens=1, stop_at_eos=True).values():
        assert len(shown(events)) == 1 and None not in shown(events)
        assert events[-2]["forwards"] == events[-1]["forwards"]


def test_holes_are_filled_and_the_ar_model_says_that_it_cannot(servers, runs, sample_main):
    prompt = "A [MASK:3] b[MASK]c"
    modes = generated(servers["whole"], prompt=prompt)
    out = sample_main("--json", "--device=cpu", f"--out_dir={runs / 'whole'}",
                      f"--prompt={prompt}")[1]
    start, done = modes["diffusion"][0], modes["diffusion"][-1]
    assert start["parts"] == ["A ", " b", "c"] and start["holes"] == [3, 1]
    assert done["text"] == json.loads(out)["text"] and done["tokens"] == 4
    cells = shown(modes["diffusion"])
    assert done["text"] == f"A {''.join(cells[:3])} b{cells[3]}c"
    assert [event["event"] for event in modes["ar"]] == ["skipped"]


# --------------------------------------------------------------------------------------------------
# Requests
def test_the_page_and_the_facts_of_the_model(servers):
    for path in ("/", "/?a=b", "/info"):
        status, headers, text = ask(servers["whole"], path=path)
        assert status == 200 and headers["Cache-Control"] == "no-store"
        assert headers["X-Content-Type-Options"] == "nosniff" and "Server" not in headers
        assert "default-src 'none'" in headers["Content-Security-Policy"]
    whole, block = (json.loads(ask(server, path="/info")[2]) for server in servers.values())
    assert whole["modes"] == ["diffusion", "ar"] and whole["chat"] and not block["chat"]
    assert block["modes"] == ["diffusion", "verified", "ar"] and block["block_size"] == 4
    assert whole["defaults"]["prompt"] == "Hello" and whole["positions"] == 1024
    assert whole["defaults"]["max_new_tokens"] == 48 - 5  # windows of 48
    assert not block["defaults"]["stop_at_eos"] and block["limits"]["drafts"] == [0, 3]
    assert generated(servers["whole"], modes=["ar"])["ar"][0]["parts"] == ["Hello"]
    page = ask(servers["whole"])[2]
    assert not re.search(r"innerHTML|insertAdjacent|document\.write|https?://(?!www.w3)", page)


@cases("kind, body, status, words", [
    ("whole", "", 400, "JSON object"), ("whole", "[1]", 400, "JSON object"),
    ("whole", "[" * 60000, 400, "JSON object"), ("whole", b"\xff", 400, "JSON object"),
    ("whole", {"stepz": 3}, 400, "did you mean 'steps'"),
    ("whole", {"out_dir": "/"}, 400, "no setting 'out_dir'"),
    ("whole", {"steps": 0}, 400, "steps must be from 1 to 1024, not 0"),
    ("whole", {"steps": "3"}, 400, "whole number"), ("whole", {"steps": None}, 400, "whole number"),
    ("whole", {"steps": 10**400}, 400, "steps must be"),
    ("whole", '{"temperature": NaN}', 400, "temperature must be a number"),
    ("whole", {"temperature": 11}, 400, "from 0 to 10"), ("whole", {"chat": 1}, 400, "true or"),
    ("whole", {"order": "best"}, 400, "confidence or entropy"),
    ("whole", {"max_new_tokens": 1024}, 400, "from 1 to 1023"),
    ("whole", {"prompt": "a" * 1020}, 400, "the model has 1024 positions"),
    ("whole", {"prompt": "[MASK:999999]" * 5000}, 400, "1024 tokens together"),
    ("whole", {"prompt": "[MASK:0]"}, 400, "is no hole"),
    ("whole", {"prompt": "\ud800"}, 400, "UTF-8"), ("whole", {"prompt": ["a"]}, 400, "a text"),
    ("whole", {"modes": ["verified"]}, 400, "diffusion, ar"),
    ("whole", {"modes": []}, 400, "modes"), ("whole", {"modes": [[]]}, 400, "modes"),
    ("block", {"prompt": "[MASK]"}, 400, "block model"), ("block", {"chat": True}, 400, "template"),
    ("block", {"drafts": 4}, 400, "drafts must be from 0 to 3"),
    ("whole", "x" * (2**16 + 1), 413, "at most 65536 bytes")])
def test_a_wrong_request_is_told_in_a_line_what_is_wrong(servers, kind, body, status, words):
    found, headers, text = ask(servers[kind], body)
    assert found == status and words in json.loads(text)["error"] and text.count("\n") == 1
    assert headers["Content-Type"].startswith("application/json")


@cases("status, asked", [
    (404, {"path": "/etc/passwd"}), (404, {"path": "/../sample.py"}), (404, {"path": "/info/"}),
    (405, {"body": "{}", "path": "/info"}), (405, {"path": "/generate"}),
    (405, {"method": "DELETE", "path": "/"}), (405, {"method": "OPTIONS", "path": "/generate"}),
    (405, {"method": "HEAD", "path": "/"}), (405, {"method": "BREW", "path": "/"}),
    (415, {"body": "{}", "Content-Type": "text/plain"}),
    (411, {"body": "{}", "Content-Length": "-1"}),
    (403, {"Host": "evil.example:{port}"}), (403, {"Host": "127.0.0.1"}), (403, {"Host": ""}),
    (403, {"Host": "127.0.0.1:{port}.evil.example"}), (403, {"Host": "localhost:1"}),
    (403, {"Origin": "http://evil.example"}), (403, {"body": "{}", "Origin": "null"}),
    (403, {"Origin": "https://127.0.0.1:{port}"}), (403, {"Origin": "http://localhost:{port}"}),
    (200, {"Origin": "http://127.0.0.1:{port}"}), (200, {"Host": "[::1]:{port}"}),
    (200, {"Host": "LOCALHOST:{port}"}), (200, {"body": '{"max_new_tokens": 1}'}),
    (200, {"Host": "localhost:{port}", "Origin": "http://localhost:{port}"})])
def test_who_may_ask_what(servers, status, asked):
    server = servers["whole"]
    asked = {name: value.replace("{port}", str(server.port)) for name, value in asked.items()}
    found, _, text = ask(server, **asked)
    assert found == status
    if status != 200 and asked.get("method") != "HEAD":
        assert set(json.loads(text)) == {"error"}


def test_what_is_not_http_is_answered_too(servers):
    with socket.create_connection(("127.0.0.1", servers["whole"].port), 30) as client:
        client.sendall(b"HELLO\r\n\r\n")
        assert b'{"error": ' in client.recv(4096)


@contextmanager
def writing(server):
    """A client that has asked for a long text and has its first pass, with some seconds to go."""
    body = json.dumps(LONG).encode()
    with socket.create_connection(("127.0.0.1", server.port), 60) as client:
        client.sendall(b"POST /generate HTTP/1.1\r\nHost: localhost:%d\r\nContent-Type: application"
                       b"/json\r\nContent-Length: %d\r\n\r\n%b" % (server.port, len(body), body))
        found = b""
        while b'"pass"' not in found:
            found += client.recv(4096)
        yield client


def test_one_text_at_a_time_and_a_client_that_leaves_ends_its_own(servers):
    server, short = servers["whole"], {"max_new_tokens": 1, "prompt": "a"}
    with writing(server):
        start = time.monotonic()
        status, headers, text = ask(server, short)
        assert status == 503 and "busy" in text and time.monotonic() - start < 5
        assert ask(server, path="/info")[0] == 200 and ask(server, {"steps": 0})[0] == 400
    left = time.monotonic()
    while ask(server, short)[0] == 503:
        assert time.monotonic() - left < 5  # of about 15 that the text takes
        time.sleep(0.05)


def test_ctrl_c_ends_it_in_the_middle_of_a_text_with_one_line(runs):
    with server_of(runs / "whole") as server, writing(server) as client:
        server.send_signal(signal.SIGINT)
        out, err = server.communicate(timeout=30)
        assert server.returncode == 0 and out.strip() == "stopped" and err == ""
        while found := client.recv(4096):  # the text has no end
            assert b'"end"' not in found


def test_what_cannot_be_served_is_one_line_before_a_model_is_loaded(sample_main):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        check_error(sample_main("--serve", f"--port={port}"), f"port: {port} cannot be opened")
    for flag in ("--json", "--verify", "--trace=a.html", "--prompts=-"):
        check_error(sample_main("--serve", flag), "is not for --serve")
    for flag in ("--evaluate=world", "--export=gguf"):
        check_error(sample_main("--serve", flag), "one at a time")
    check_error(sample_main("--serve", "--port=70000"), "from 0 to 65535")
