"""A page to try a model in a browser, on this machine alone.

  python sample.py --serve                              # http://127.0.0.1:8000, the newest run
  python sample.py --serve --out_dir=outputs/tiny_diffusion --port=0 --temperature=0.7

GET / is assets/page.html, GET /info what the model can do. POST /generate takes settings of
sample.py as JSON, and "modes": diffusion, verified, ar. It answers with a JSON object a line, while
the text comes to be: for each mode start, pass after pass and done, or skipped; at last end.
"""
import base64
import functools
import hashlib
import json
import os
import re
import socketserver
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import torch

import sample
from configurator import UserError, check_value, out_of_memory
from convert import generate, read_record
from corpus import end_ids
from drafting import choose
from machine import speed_up_sampling
from replay import text_after
from verify import decode_verified, reach

BODY, NEW, ALL = 2**16, 1024, 4096  # at most: bytes of a request, new tokens, tokens in all
NAMES = ("prompt chat max_new_tokens stop_at_eos steps order threshold remask temperature top_k "
         "top_p drafts seed").split()  # settings of sample.py that a request may have
GUARDS = {  # headers of each answer
    "Cache-Control": "no-store", "Connection": "close", "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer", "Cross-Origin-Resource-Policy": "same-origin"}


# --------------------------------------------------------------------------------------------------
# Generation, as events
def pieces(text_of_ids, row, mask_id):
    """The text of each token of a row, None for a mask. Of tokens that make up one character, as
    bytes do, the first has it and the others are empty."""
    texts, group = [], []
    for token in row:
        if token == mask_id:
            texts, group = [*texts, None], []
            continue
        texts.append(text_of_ids((token,)))
        group.append(token)
        text = text_of_ids(tuple(group))
        if not text.endswith("\ufffd"):
            texts[-len(group):] = [text, *[""] * (len(group) - 1)]
        if not text.endswith("\ufffd") or len(group) == 4:
            group = []
    return texts


def write(page, mode, s, encoded, send):
    """Generate in one mode and send its events; the clock stands still meanwhile."""
    model, (ids, holes) = page.model, encoded
    before, ends = ids[:holes[0].start], page.ends if s.stop_at_eos else []
    sampling = {"temperature": s.temperature, "top_k": s.top_k, "top_p": s.top_p}
    drafts, branches, plan = page.drafting(s, len(before)) if mode == "verified" else (0, 0, None)
    generator = torch.Generator(model.device).manual_seed(s.seed)
    torch.manual_seed(s.seed)  # of the random tokens that noise="uniform" takes for masks
    shown, calls, waited, start = {}, 0, 0.0, time.perf_counter()

    def show(row, sure=()):
        nonlocal calls, waited
        now, calls, at, changed = time.perf_counter(), calls + 1, 0, []
        forwards = calls
        if mode == "diffusion" and model.block_size:  # one more for the first token of each block
            forwards += -(-(len(row) - len(before)) // model.block_size)
        for hole in holes:
            for i, text in enumerate(pieces(page.text_of_ids, row[hole], model.mask_id)):
                if text != shown.get(at + i):
                    shown[at + i] = text
                    changed.append([at + i, text, *(round(p, 3) for p in sure[hole][i:i + 1])])
            at += hole.stop - hole.start
        send({"event": "pass", "mode": mode, "forwards": forwards, "set": changed,
              "seconds": round(now - start - waited, 3)})
        waited += time.perf_counter() - now

    def show_new(new):
        if not calls and len(new[0]) > 1:  # the first is from the pass of the prompt
            show(before + new[0][:1])
        show(before + new[0])

    if mode == "diffusion":
        prompt, more = (before, s.max_new_tokens) if model.block_size else (ids, 0)
        [row], forwards = generate(
            model, [prompt], more, s.steps, ends, lambda x, p: show(x[0].tolist(), p[0].tolist()),
            sampling=sampling, order=s.order, threshold=s.threshold, remask=s.remask,
            generator=generator)
        counts = {"forwards": forwards}
    else:
        [new], counts = decode_verified(
            model, [before], s.max_new_tokens, drafts, branches, sampling, ends, [s.seed],
            show_new, s.tree if drafts else 0, plan)
        row = before + new
        if not shown:
            show_new([new])
    seconds = time.perf_counter() - start - waited
    token_ids, text = sample.text_of(page.tokenizer, s.prompt, ids, holes, row, ends)
    send({"event": "done", "mode": mode, "text": text, "token_ids": token_ids}
         | figures(sum(len(row[hole]) for hole in holes), len(token_ids), seconds, counts))


def figures(n, n_shown, seconds, counts):
    """Of n tokens written, of which those behind an end are not shown, as sample.py tells them."""
    n_forwards = max(1, counts["forwards"])
    return {"tokens": n_shown, "tokens_per_s": round(n / max(seconds, 1e-9), 1),
            "tokens_per_forward": round(n / n_forwards, 3), "seconds": round(seconds, 3)} | {
        name: counts[name] for name in ("forwards", "checks", "drafted", "accepted")
        if name in counts}


class Page:
    """The model of a page, what may be asked of it, and what it answers."""

    def __init__(self, model, tokenizer, folder, s):
        record = read_record(folder)
        self.model, self.tokenizer, self.plans = model, tokenizer, {}
        self.settings = vars(s) | {"verify_batch": 1}
        self.ends, self.busy = end_ids(model.lm, tokenizer), threading.Lock()
        self.text_of_ids = functools.lru_cache(2**16)(lambda x: text_after(tokenizer, list(x)))
        self.modes = ["diffusion", *(["verified"] if model.block_size else []), "ar"]
        self.limits = sample.allowed | {
            "max_new_tokens": (1, min(NEW, model.max_positions - 1)), "steps": (1, NEW),
            "remask": (0, NEW), "temperature": (0, 10), "drafts": (0, max(0, model.block_size - 1))}
        self.defaults = {name: vars(s)[name] for name in NAMES}
        self.defaults["prompt"] = s.prompt or record["settings"].get("sample_prompt", "")
        for name in ("max_new_tokens", "steps", "remask", "temperature", "drafts"):
            self.defaults[name] = min(self.defaults[name], self.limits[name][1])
        window, new = record["max_seq_length"], s.max_new_tokens
        used = len(tokenizer.encode(self.defaults["prompt"]))
        if new == sample.max_new_tokens and used < window < used + new:
            self.defaults["max_new_tokens"] = window - used  # it has seen no longer texts
        self.info = {
            "name": folder.resolve().parent.name, "folder": folder.name, "modes": self.modes,
            "block_size": model.block_size, "window": window, "device": str(model.device),
            "positions": min(ALL, model.max_positions), "dtype": str(model.lm.dtype)[6:],
            "parameters": sum(p.numel() for p in model.parameters()),
            "chat": bool(tokenizer.chat_template), "defaults": self.defaults,
            "limits": {name: self.limits[name] for name in NAMES
                       if isinstance(self.limits.get(name), tuple)}}

    def read(self, body):
        """(Settings, modes) of a request's body; UserError for what is wrong with them."""
        try:
            given = json.loads(body)
        except (ValueError, RecursionError):
            given = None
        if not isinstance(given, dict):
            raise UserError("request: the body must be a JSON object of settings")
        modes = given.pop("modes", self.modes)
        if not isinstance(modes, list) or not modes or any(x not in self.modes for x in modes):
            raise UserError(f"request: modes must be a list of {', '.join(self.modes)}")
        values = {name: check_value(name, value, self.defaults, self.limits.get(name), "request")
                  for name, value in given.items()}
        s = SimpleNamespace(**self.settings | self.defaults | values)
        s.prompt = s.prompt or self.defaults["prompt"]
        if any("\ud800" <= c <= "\udfff" for c in s.prompt):
            raise UserError("prompt: is not text in UTF-8")
        if sum(int(n or 1) for n in re.findall(sample.HOLE, s.prompt)) > NEW:
            raise UserError(f"prompt: its holes may have {NEW} tokens together")
        return s, [mode for mode in self.modes if mode in modes]

    def encode(self, s, modes):
        """sample.encode() of a request; UserError for what has no room."""
        beyond = reach(self.model, s.drafts) if "verified" in modes else 0
        encoded = sample.encode(self.model, self.tokenizer, s.prompt, s.max_new_tokens, s.chat,
                                beyond)
        if len(encoded[0]) > ALL:
            raise UserError(f"prompt: it and what follows have {len(encoded[0])} tokens, here at "
                            f"most {ALL}")
        return encoded

    def drafting(self, s, context):
        """(drafts, branches, plan) of decode_verified(); the machine is measured once for each
        length of a prompt, roughly."""
        key = s.drafts, context // 256
        if key not in self.plans:
            self.plans[key] = choose(self.model, s, context)
        return self.plans[key]

    def events(self, s, modes, encoded, send):
        """Write in each mode, one after the other, so that each has the machine to itself."""
        inside = bool(re.search(sample.HOLE, s.prompt))
        parts = re.split(sample.hole_in(self.tokenizer), "" if s.chat and not inside else s.prompt)
        holes = [hole.stop - hole.start for hole in encoded[1]]
        for mode in modes:
            if mode == "ar" and inside:
                send({"event": "skipped", "mode": mode, "why": "The AR model writes left to right: "
                      "it cannot fill a hole from both sides."})
                continue
            send({"event": "start", "mode": mode, "parts": parts[::2], "holes": holes,
                  "length": len(encoded[0])})
            try:
                write(self, mode, s, encoded, send)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                return send({"event": "error", "error": "out of memory: ask for fewer tokens"})
        send({"event": "end"})


# --------------------------------------------------------------------------------------------------
# HTTP
class Handler(BaseHTTPRequestHandler):
    """Answers one request."""
    timeout = 10  # seconds for a client to send or to take something

    def answer(self, code, content, kind="application/json; charset=utf-8", **more):
        """Send an answer; with content None the caller goes on with it."""
        if isinstance(content, dict):
            content = json.dumps(content).encode() + b"\n"
        length = {} if content is None else {"Content-Length": len(content)}
        self.send_response_only(code)
        for name, value in ({"Content-Type": kind} | length | self.server.guards | more).items():
            self.send_header(name, value)
        self.end_headers()
        if content and self.command != "HEAD":
            self.wfile.write(content)

    def send_error(self, code, message=None, explain=None):
        """What http.server itself refuses, in the form of our errors."""
        self.answer(405 if code == 501 else code, {"error": message or "not HTTP"})

    def log_message(self, *_):
        """Texts are nobody's business, so nothing is logged."""

    def respond(self):
        """Answer, if this page asks and not another in the same browser, by a name of its own."""
        path, hosts = self.path.partition("?")[0], self.headers.get_all("Host", [""])
        ours = self.server.hosts
        if len(hosts) > 1 or hosts[0].lower() not in ours or self.headers.get_all(
                "Origin", [f"http://{hosts[0]}"]) != [f"http://{hosts[0]}"]:
            return self.answer(403, {"error": f"Host and Origin must be http://{ours[0]}"})
        method = {"/": "GET", "/info": "GET", "/generate": "POST"}.get(path)
        if not method:
            return self.answer(404, {"error": "there is only /, /info and /generate"})
        if self.command != method:
            return self.answer(405, {"error": f"{path} takes {method} alone"}, Allow=method)
        if path == "/":
            return self.answer(200, self.server.html, "text/html; charset=utf-8")
        if path == "/info":
            return self.answer(200, self.server.page.info)
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]{1,15}", length):
            return self.answer(411, {"error": "request: needs a Content-Length"})
        body = self.rfile.read(min(int(length), 2**20))  # if we hung up, it might not hear why
        if int(length) > BODY:
            return self.answer(413, {"error": f"request: at most {BODY} bytes, not {length}"})
        if self.headers.get_content_type() != "application/json":
            return self.answer(415, {"error": "request: Content-Type must be application/json"})
        self.generate(self.server.page, body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_OPTIONS = do_PATCH = respond

    def generate(self, page, body):
        """Answer with the events of a text. When the client has gone, a write fails: it ends."""
        def send(event):
            if self.server.stopping:
                raise ConnectionAbortedError
            self.wfile.write(json.dumps(event).encode() + b"\n")

        try:
            s, modes = page.read(body)
            if not page.busy.acquire(blocking=False):
                return self.answer(503, {"error": "busy: one text at a time; try again when the "
                                         "other is done"}, **{"Retry-After": "1"})
            try:
                encoded = page.encode(s, modes)
                self.answer(200, None, "application/x-ndjson")
                page.events(s, modes, encoded, send)
            finally:
                page.busy.release()
        except UserError as error:
            self.answer(400, {"error": str(error)})


class Server(ThreadingHTTPServer):
    """Listens on this machine alone; port 0 is a free one."""
    stopping = False

    def __init__(self, port, html):
        super().__init__(("127.0.0.1", port), Handler)
        port = self.server_address[1]
        self.hosts = [f"{name}:{port}" for name in ("127.0.0.1", "localhost", "[::1]")]
        if port == 80:
            self.hosts += ["127.0.0.1", "localhost", "[::1]"]
        self.html = html
        allowed = {}  # the page's own style and script, and no other
        for name in (b"style", b"script"):
            [code] = re.findall(b"<%b>(.*?)</%b>" % (name, name), self.html, re.S)
            allowed[name] = base64.b64encode(hashlib.sha256(code).digest()).decode()
        self.guards = GUARDS | {"Content-Security-Policy": (
            f"default-src 'none'; style-src 'sha256-{allowed[b'style']}'; img-src data:; "
            f"script-src 'sha256-{allowed[b'script']}'; connect-src 'self'; base-uri 'none'; "
            "form-action 'none'; frame-ancestors 'none'")}

    def server_bind(self):  # http.server's own asks a name server, which may take long
        socketserver.TCPServer.server_bind(self)

    def handle_error(self, request, address):
        if not isinstance(sys.exception(), (ConnectionError, TimeoutError)):  # the client has gone
            super().handle_error(request, address)


def prepare_page(s):
    """work(model, tokenizer, folder), which serves the page until Ctrl-C. s: settings of sample.py.
    UserError where that cannot be, before a model is loaded."""
    for name in ("prompts", "verify", "compare", "watch", "trace", "json"):
        if vars(s)[name]:
            raise UserError(f"{name}: is not for --serve; the page has its own settings")
    html = Path(__file__).with_name("assets").joinpath("page.html").read_bytes()
    try:
        server = Server(s.port, html)
    except OSError as error:
        raise UserError(f"port: {s.port} cannot be opened: {error.strerror}; --port=0 takes a free "
                        "one") from None

    def work(model, tokenizer, folder):
        page = server.page = Page(model, tokenizer, folder, s)
        speed_up_sampling(model)
        first = page.read(json.dumps({"max_new_tokens": 2, "prompt": "a"}))
        page.events(*first, page.encode(*first), lambda event: None)  # else slower than the second
        print(f"{folder}: a page to try it at http://{server.hosts[0]} on this machine; Ctrl-C "
              "ends it", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            server.stopping = True
            page.busy.acquire(timeout=10)  # not in the middle of a pass
            print("\nstopped", flush=True)
            os._exit(0)  # a thread may still free what a text had, which an orderly end would abort
    return work
