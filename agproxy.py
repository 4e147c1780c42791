#!/usr/bin/env python3
"""agproxy: lets any AI coding client use any model account its owner has.

One file, standard library only, Python 3.9 to the newest.  Clients speak Anthropic Messages,
OpenAI Chat, OpenAI Responses or Gemini to it; the tokens come from whichever of the owner's
accounts can serve: keys of a dozen services, servers of one's own, Google sign-ins.  Nothing is
phoned home; what leaves the machine is listed in the README.

A request:  17 Handler reads it -> its dialect (9, 10 or 11) parses it to a Request (7) -> 16 the
conductor asks the owner's routes and leases an account (13, token from 14) -> the upstream's
dialect renders the body -> 15 calls over 12 -> 6 splits the events -> the upstream's dialect
parses them to deltas (7) -> the client's renders those -> 17 writes; where both are the same,
it passes on what came, body and events;
from the first content on the relay (17) moves the stream, and its end settles the lease.

Rooms, in reading order; each uses only rooms above it.  Numbers are addresses and have gaps:

     1. Constants and model catalogue
     2. Errors
     3. Small tools
     4. Config
     5. Records
     6. Wire framing
     7. Neutral form
     8. Bridges
     9. Anthropic dialect
    10. OpenAI dialects
    11. Gemini dialect and envelope
    12. Connections
    13. Accounts
    14. OAuth
    15. Upstream call
    16. Conductor
    17. Relay and server
    18. Simulated upstream
    19. Terminal
    20. Commands

`python3 agproxy.py map` prints them with their present line numbers.
"""
from __future__ import annotations

import contextlib
import os
import sys
import time


def _is_own(found: os.stat_result, others: int) -> bool:
    """Whether only this user and root can write it; `others` are the bits of the rest."""
    return found.st_mode & others == 0 and found.st_uid in (0, os.getuid())


def kept_bytecode(source: str, running: Any = None) -> str:
    """The path of a program's bytecode, made now where there is none; "" where none may be.  One
    that somebody else may have put there is never used.  `running` is its code as it runs now.
    Raises OSError, ValueError."""
    import importlib.util
    import marshal
    path = importlib.util.cache_from_source(source)
    with open(source, "rb") as handle:
        text, mine = handle.read(), os.fstat(handle.fileno())
    head = importlib.util.MAGIC_NUMBER + b"".join(
        (number & 0xffffffff).to_bytes(4, "little") for number in (0, int(mine.st_mtime),
                                                                   mine.st_size))
    if not sys.dont_write_bytecode:
        os.makedirs(os.path.dirname(path), 0o755, exist_ok=True)
    if not _is_own(os.stat(os.path.dirname(path)), 0o2):
        return ""
    with contextlib.suppress(OSError, ValueError, EOFError, TypeError), open(path, "rb") as handle:
        is_own, data = _is_own(os.fstat(handle.fileno()), 0o22), handle.read()
        # whole, and not of a file that was moved here: traces would not find its lines
        if is_own and data[:16] == head and marshal.loads(data[16:]).co_filename == source:
            return path
    if sys.dont_write_bytecode:
        return ""
    if running is None or running.co_filename != source or time.time() - mine.st_mtime < 10:
        running = compile(text, source, "exec", dont_inherit=True)  # it may be of an older text
    temporary = f"{path}.{os.getpid()}"
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644), "wb") as handle:
            handle.write(head + marshal.dumps(running))
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)        # of a full disk
    return path


def start_from_bytecode() -> None:
    """Replaces this process by one that runs the same program from Python's bytecode cache; returns
    where that cannot be.  The interpreter keeps the syntax tree of a script for as long as it runs:
    45 MB here, of 77."""
    program = sys._getframe(1)
    if program.f_back is not None:
        return      # run by another program: `-m`, a profiler, a debugger
    if hasattr(sys, "orig_argv"):
        options = sys.orig_argv[1:-len(sys.argv)]       # the interpreter's own
    else:
        import subprocess
        if sys._xoptions or subprocess._args_from_interpreter_flags():
            return  # Python 3.9 does not tell them as they were given
        options = []
    path = kept_bytecode(__file__, program.f_code)
    if path and sys.executable:
        os.execv(sys.executable, [sys.executable, *options, path, *sys.argv[1:]])


if __name__ == "__main__" and os.name == "posix" and __file__.endswith(".py") and (
        not sys.argv[1:] or sys.argv[1] in ("serve", "run") or sys.argv[1].startswith("-")):
    with contextlib.suppress(OSError, ValueError, NotImplementedError):     # no place for a cache
        start_from_bytecode()

import argparse
import base64
import collections
import copy
import difflib
import enum
import errno
import fnmatch
import functools
import hashlib
import hmac
import http.client
import http.server
import itertools
import json
import queue
import random
import re
import select
import selectors
import signal
import socket
import ssl
import string
import subprocess
import threading
import traceback
import urllib.parse
import zlib
from dataclasses import dataclass, field, replace
from json.decoder import scanstring
from json.encoder import encode_basestring_ascii as quote
from typing import Any, Callable, Iterable, Iterator, Mapping, NamedTuple

try:
    import fcntl
except ImportError:     # Windows locks files by msvcrt
    fcntl = None

# ── 1. Constants and model catalogue ──────────────────────────────────────
# Facts about the world outside, each with its unit and source, each in one
# place.  No logic lives here.  The accounts file may override any provider
# cell and any setting.

VERSION = "0.1.0"


class Setting(NamedTuple):
    default: Any
    variable: str       # environment variable; AGPROXY_<NAME> works for each as well
    about: str          # one line for the README


WINDOW_MARK = re.compile(r"\[[^\]]*\]\Z")     # `[1m]` at the end of a model's name
SMALL_KINDS = ("probe", "warmup", "title", "topic", "paths", "summary", "suggestion")
SETTINGS = {            # a number's unit is in its name; bounds are in `Config`
    "host": Setting("127.0.0.1", "BIND_ADDRESS", "address to listen on"),
    "port": Setting(8080, "PORT", "port to listen on; 0 takes any free one"),
    "strategy": Setting("hybrid", "", "how an account is chosen, see above"),
    "soft_limit": Setting(0.2, "SOFT_LIMIT_THRESHOLD",
                          "accounts with at most this fraction left are passed over; 0 is off"),
    "fallback": Setting(False, "ENABLE_FALLBACK", "serve a model's pair when it is exhausted"),
    "pid_offset": Setting(False, "", "begin with another account in each process"),
    "auto_refresh": Setting(False, "", "start each account's 5 h window as soon as it may begin"),
    "quota_poll_s": Setting(420, "", "between two quota readings of an account in use"),
    "affinity_s": Setting(3600, "", "how long a conversation's account is remembered"),
    "hybrid_fresh": Setting(1000.0, "", "score of an account not used for five hours"),
    "hybrid_health": Setting(2.0, "", "... per point of health (0 to 100)"),
    "hybrid_tokens": Setting(5.0, "", "... per percent of its burst allowance"),
    "hybrid_quota": Setting(3.0, "", "... per percent of quota left"),
    "hybrid_idle": Setting(0.1, "", "... per second since its last use, an hour at most"),
    "small_requests": Setting(SMALL_KINDS, "", "Claude Code's small requests that are recognised"),
    "background_model": Setting("", "", "serves those that need a model; empty: the one asked for"),
    "hidden_models": Setting((), "", "patterns of models that are served, but not listed"),
    "unknown_model": Setting("reject", "", "a name nobody knows: `reject`, `pass` (to services "
                             "that take any name) or `default`"),
    "default_model": Setting("", "", "what `unknown_model: default` serves by"),
    "proxy": Setting("", "", "URL of a proxy for all upstreams (http, socks5), or `direct`"),
    "ca_file": Setting("", "", "PEM file of further authorities that may certify upstreams"),
    "search_model": Setting("gemini-3-flash", "", "searches the web for models that cannot"),
    "tool_hardening": Setting(False, "", "name each tool's parameters in its description too"),
    "usage_scaling": Setting(False, "", "report tokens by the window a client assumes: see above"),
    "client_window_tokens": Setting(0, "", "that window; 0 guesses it from model, beta and client"),
    "max_attempts": Setting(4, "", "tries per request that mark no account"),
    "max_empty_retries": Setting(2, "", "repeats after an empty answer"),
    "max_wait_s": Setting(120, "", "longest wait for an account to be released"),
    "connect_timeout_s": Setting(10, "", "TCP and TLS together"),
    "first_byte_timeout_s": Setting(150, "", "thinking models stay silent for over a minute"),
    "idle_timeout_s": Setting(300, "", "silence of the upstream in mid-answer"),
    "unary_timeout_s": Setting(290, "",
                               "non-streaming request in all; Claude Code gives up at 300"),
    "total_timeout_s": Setting(3600, "", "streaming request in all"),
    "client_head_timeout_s": Setting(10, "", "a client's request head in all"),
    "client_body_timeout_s": Setting(30, "", "each 64 KiB of a client's body"),
    "client_idle_timeout_s": Setting(65, "", "a kept connection without a request"),
    "drain_s": Setting(30, "", "grace for running answers at shutdown"),
    "max_connections": Setting(2048, "", "client connections"),
    "max_threads": Setting(256, "", "threads that serve requests"),
    "max_upstream_calls": Setting(1536, "", "upstream calls in flight"),
    "max_body_bytes": Setting(32 << 20, "", "request body; the Messages API's own limit"),
    "max_state_bytes": Setting(64 << 20, "", "state.db; the oldest requests go first"),
    "hosts": Setting((), "", "further Host names that requests may be addressed to"),
    "cors_origins": Setting((), "CORS_ORIGINS", "web origins that may call from a browser"),
    "tls_cert": Setting("", "", "PEM file of a certificate and its chain: clients are served by "
                        "TLS"),
    "tls_key": Setting("", "", "PEM file of its private key, where that is not in `tls_cert`"),
}

WORKER_LASTS_S = 60             # a worker process that lived longer is begun again after 1 s
LAST_TRY_BEGINS_S = 240         # no try begins later into a request (clients give up at 300)
HOLD_S = 15                     # the status line waits this long for the first content
PING_EVERY_S = 10               # silence towards a streaming client before a ping
BEAT_EVERY_S = 45               # ... before an empty delta: Claude Code 2.1.197 ignores pings
SEND_STALL_S = 30               # a client that reads nothing for so long is dropped
THREAD_WAIT_S = 2.0             # a request that no thread takes for so long is answered 503
LOOKS_PER_S = 20                # at streams in the relay, a share of them each time
RETURN_MEMORY_S = 10.0          # a millisecond of work without any lock
MOST_LINES = 10_000             # of the log that wait to be written
THREAD_IDLE_S = 3.0             # a thread without work ends
LOG_EVERY_S = 0.05              # lines of that time are written together
KEPT_BY_THREAD_S = 1.0          # a thread stays this long with a connection it answered
CLIENT_WINDOW, CLIENT_WIDE_WINDOW = 200_000, 1_000_000     # what Claude Code takes for a window
WIDE_SINCE = (2, 1, 329)        # ... of models it does not know, as seen in November 2026
COMPACTS_BEFORE = 33_000        # its end, on Claude Code's own scale
ROOM_LEFT = 80_000              # of the true window when it compacts, with usage_scaling
MAX_HEAD_BYTES = 32 << 10       # all header lines together
MAX_LINE_BYTES = 8 << 10        # request line, or one header line
MAX_HEADERS = 100
MAX_MODEL_NAME = 200
MAX_JSON_DEPTH = 200
MAX_JSON_DIGITS = 40            # older Pythons parse long integers in quadratic time
MAX_EVENT_BYTES = 16 << 20      # one upstream event
MAX_UNREAD_USAGES = 1000        # of a stream, kept as they came until somebody asks
MAX_REPLY_BYTES = 64 << 20      # one upstream answer that is not a stream
MAX_ERROR_BYTES = 1 << 20       # the body of an upstream's error
MAX_ERROR_LETTERS = 4000        # of its message: patterns look for its meaning
MAX_PUBLIC_BODY_BYTES = 1 << 20     # a request body on a route that needs no key
MAX_STATED_DELAY_S = 8 * 86400  # Google's windows are a week at most; more is void
RECV_BYTES = 64 << 10
UPSTREAM_IDLE_S = 60            # a kept upstream connection
UPSTREAM_IDLE_PER_HOST = 64
TOKEN_TIMEOUT_S = 15
CALIBRATE_EVERY_S = 20          # a model's answers are compared with our own count so often
TOKEN_FACTORS = (               # true tokens by our count before anything was learned
    ("claude-opus-4-[7-9]*", 1.27), ("claude-opus-[5-9]*", 1.27), ("claude-sonnet-[5-9]*", 1.27),
    ("claude-haiku-[5-9]*", 1.27), ("claude-fable-*", 1.27))
COUNT_TIMEOUT_S = 2             # an upstream's count; then the estimate is told
TOKEN_REFRESH_BEFORE_S = 300    # refreshed when less life than this is left
WAIT_AT_MOST_IN_PLACE_S = 3     # a stated rate-limit delay up to this is waited for in place
GUESSED_REST_S = {              # rests nobody stated, by consecutive failures of the key
    "quota": (60, 300, 1800, 7200), "rate": (30,), "soft": (10,),
    "capacity": (5, 10, 20, 30, 60), "host": (20,), "token": (5, 20, 60, 300),
    "hour": (3600,), "day": (86400,), "version": (600,),
}
HOME_WAIT_S = 3                 # a conversation waits so long for its account while that is busy
HOME_WARM_S = 300               # ... if it was served there so lately: prompt caches live minutes
RAMP_START, RAMP_END = 8, 64    # requests at a time after a switch, doubled by each success
HEALTH_START, HEALTH_LEAST = 70, 50     # of 100; below the least an account is the last choice
HEALTH_STEPS = {"success": 1, "limit": -10, "failure": -20, "hour": 10}
BURST_TOKENS, BURST_PER_MINUTE = 50, 6  # allowance of requests that the hybrid score watches
QUOTA_CRITICAL = 0.05           # the hybrid strategy takes such an account last
FIVE_HOURS_S = 5 * 3600         # the shorter of Cloud Code's quota windows
QUOTA_TIMEOUT_S = 10
LATEST_RESET_S = 400 * 86400    # a reset that is told for later is unknown
LIST_WAIT_S = 5                 # a request with a name nobody knows waits for lists so long
MOST_LISTED = 5000              # models taken over from one upstream's list
QUOTA_STALE_S = 600             # older readings are shown as stale and decide nothing
QUOTA_IDLE_POLL_S = 3600        # of accounts that nobody uses
QUOTA_POINTS = 200              # remembered per window for the burn rate
STATE_AGAIN_S = 60              # a state.db that could not be had is tried again
RECHECK_S = 900                 # a long stated limit is looked at again by a free quota reading
FACTS_LAST_S = 86400            # a project, tier and catalogue are asked for again after
ABSENT_LASTS_S = 6 * 3600       # ... and a pool that was absent
KEEP_REQUESTS_S = 30 * 86400    # in state.db
SIGNATURES_LAST_S = 86400       # unused: a conversation is taken up again the next day
MOST_SIGNATURES, MOST_SIGNATURE_LETTERS = 5000, 8 << 20
MOST_RECALLED_BYTES, MOST_LINKS = 32 << 20, 2000        # of one conversation by their ids
REPLIES_LAST_S, MOST_REPLY_BYTES = 86400, 64 << 20      # that clients go on from by id
LOGIN_WAIT_S = 300              # a browser sign-in in all
ONBOARD_TRIES, ONBOARD_PAUSE_S = 12, 5


class Model(NamedTuple):
    id: str                 # asked for by clients, sent to Cloud Code
    label: str
    family: str             # claude, gemini3, gemini25, gpt-oss, image: how its upstream behaves
    context_tokens: int
    output_tokens: int
    min_budget: int         # thinking tokens; min 0 means thinking can be switched off
    max_budget: int
    default_budget: int     # -1 lets the model decide
    on_cloud_code: bool
    key_id: str             # its id on the Gemini API, "" where that does not serve it
    levels: str = ""        # thinking levels the Gemini API takes instead of budgets


# What models of one line share: family, context, output, least and most thinking tokens
_CLAUDE = ("claude", 200000, 64000, 1024, 62976)
_PRO = ("gemini3", 1048576, 65535, 128, 32768)
_FLASH = ("gemini3", 1048576, 65536, 0, 32768)
_IMAGE = ("image", 65536, 32768, 0, 0)
_ALL, _LMH = "minimal low medium high", "low medium high"
# ... and how the two services name one: on Cloud Code, id on the Gemini API, its levels
_PRO31 = (True, "gemini-3.1-pro-preview", _LMH)
_FLASH38 = (True, "gemini-3.8-flash", _ALL)
_FLASH37 = (True, "gemini-3.7-flash", _LMH)
_FLASH36 = (True, "gemini-3.6-flash", _ALL)
_FLASH35 = (True, "gemini-3.5-flash", _ALL)
MODELS = {row.id: row for row in (      # Cloud Code and Gemini API catalogues, September 2026
    # id, label, line, default thinking tokens, on Cloud Code, id on the Gemini API, its levels
    Model("claude-opus-4-6-thinking", "Claude Opus 4.6", *_CLAUDE, 16000, True, ""),
    Model("claude-sonnet-4-6", "Claude Sonnet 4.6", *_CLAUDE, 16000, True, ""),
    Model("gemini-pro-agent", "Gemini 3.1 Pro (High)", *_PRO, 10001, *_PRO31),
    Model("gemini-3.1-pro-low", "Gemini 3.1 Pro (Low)", *_PRO, 1001, *_PRO31),
    Model("gemini-3.8-flash-high", "Gemini 3.8 Flash (High)", *_FLASH, -1, *_FLASH38),
    Model("gemini-3.8-flash-medium", "Gemini 3.8 Flash (Medium)", *_FLASH, 4000, *_FLASH38),
    Model("gemini-3.8-flash-low", "Gemini 3.8 Flash (Low)", *_FLASH, 1000, *_FLASH38),
    Model("gemini-3.7-flash-high", "Gemini 3.7 Flash (High)", *_FLASH, -1, *_FLASH37),
    Model("gemini-3.7-flash-medium", "Gemini 3.7 Flash (Medium)", *_FLASH, 4000, *_FLASH37),
    Model("gemini-3.7-flash-low", "Gemini 3.7 Flash (Low)", *_FLASH, 1000, *_FLASH37),
    Model("gemini-3.6-flash-high", "Gemini 3.6 Flash (High)", *_FLASH, -1, *_FLASH36),
    Model("gemini-3.6-flash-medium", "Gemini 3.6 Flash (Medium)", *_FLASH, 4000, *_FLASH36),
    Model("gemini-3.6-flash-low", "Gemini 3.6 Flash (Low)", *_FLASH, 1000, *_FLASH36),
    Model("gemini-3-flash-agent", "Gemini 3.5 Flash (High)", *_FLASH, 10000, *_FLASH35),
    Model("gemini-3.5-flash-low", "Gemini 3.5 Flash (Medium)", *_FLASH, 4000, *_FLASH35),
    Model("gemini-3.5-flash-extra-low", "Gemini 3.5 Flash (Low)", *_FLASH, 1000, *_FLASH35),
    Model("gemini-3-flash", "Gemini 3 Flash", "gemini3", 1048576, 65536, 128, 32768, -1, True,
          "gemini-3-flash-preview", _ALL),
    Model("gemini-3.1-flash-lite", "Gemini 3.1 Flash Lite", "gemini3", 1048576, 65535, 0, 32768,
          0, True, "gemini-3.1-flash-lite", _ALL),
    Model("gemini-3-pro-preview", "Gemini 3 Pro Preview", *_PRO, -1, False,
          "gemini-3-pro-preview", "low high"),
    Model("gemini-2.5-pro", "Gemini 2.5 Pro", "gemini25", 1048576, 65536, 128, 32768, -1, False,
          "gemini-2.5-pro"),
    Model("gemini-2.5-flash", "Gemini 2.5 Flash", "gemini25", 1048576, 65536, 0, 24576, 0, False,
          "gemini-2.5-flash"),
    Model("gemini-2.5-flash-lite", "Gemini 2.5 Flash Lite", "gemini25", 1048576, 65536, 0, 24576,
          0, False, "gemini-2.5-flash-lite"),
    Model("gemini-3.1-flash-image", "Gemini 3.1 Flash Image", *_IMAGE, 0, True,
          "gemini-3.1-flash-image-preview"),
    Model("gemini-3-pro-image", "Gemini 3 Pro Image", *_IMAGE, 0, True,
          "gemini-3-pro-image-preview"),
    Model("gpt-oss-120b-medium", "GPT-OSS 120B (Medium)", "gpt-oss", 114000, 32768, 0, 8192, 8192,
          True, ""),
)}

# Names people and clients use -> models in order of preference; the first that any account
# can serve is taken.  Patterns as in fnmatch, the first match wins.
ALIASES = {
    "gemini-3-pro-low": ("gemini-3.1-pro-low",),
    "gemini-3*-pro*": ("gemini-pro-agent", "gemini-3-pro-preview"),
    "gemini-pro-latest": ("gemini-pro-agent",),
    "gemini-3-flash-preview": ("gemini-3-flash",),
    "gemini-3.5-flash*": ("gemini-3-flash-agent",),
    "gemini-3.6-flash*": ("gemini-3.6-flash-high",),
    "gemini-3.7-flash*": ("gemini-3.7-flash-high",),
    "gemini-3.8-flash*": ("gemini-3.8-flash-high",),
    "gemini-flash-latest": ("gemini-3.8-flash-high",),
    "gemini-*-image*": ("gemini-3.1-flash-image", "gemini-3-pro-image"),
    "gpt-oss*": ("gpt-oss-120b-medium",),
}
HEIRS = {       # Cloud Code serves these by their successors, which clients of the older ones get
    "gemini-2.5-pro": "gemini-pro-agent", "gemini-3-pro-preview": "gemini-pro-agent",
    "gemini-2.5-flash": "gemini-3-flash", "gemini-2.5-flash-lite": "gemini-3.1-flash-lite"}
TIERS = {       # a word in a Claude name; clients ask for ids that no other upstream knows
    "opus": ("claude-opus-4-6-thinking", "gemini-pro-agent", "gemini-3-pro-preview"),
    "fable": ("claude-opus-4-6-thinking", "gemini-pro-agent", "gemini-3-pro-preview"),
    "haiku": ("gemini-3-flash",),
    "sonnet": ("claude-sonnet-4-6", "gemini-3-flash-agent"),
}
SEARCH_TOOLS = {"web_search": "web_search_20250305", "web_fetch": "web_fetch_20250910"}
ADAPTIVE_MODELS = (     # decide themselves how long to think; older Claudes want a budget
    "claude-opus-4-[6-9]*", "claude-sonnet-4-[6-9]*", "claude-*-[5-9]*", "claude-[5-9]*")
FALLBACKS = {       # with `fallback`: what serves when a model is exhausted; one hop, no chains
    "claude-opus-4-6-thinking": "gemini-pro-agent", "claude-sonnet-4-6": "gemini-3-flash",
    "gemini-pro-agent": "claude-opus-4-6-thinking", "gemini-3.1-pro-low": "claude-sonnet-4-6",
    "gpt-oss-120b-medium": "gemini-3-flash", "*flash*": "claude-sonnet-4-6",
}
# The Gemini CLI pool knows models by their ids on the Gemini API; those it serves, with exceptions
GEMINI_CLI_IDS = {**{name: name for name in (
    "gemini-2.5-pro", "gemini-2.5-flash", "gemini-2.5-flash-lite", "gemini-3-pro-preview",
    "gemini-3.1-pro-preview", "gemini-3-flash-preview", "gemini-3.1-flash-lite")},
    "gemini-3.5-flash": "gemini-3-flash"}


class Provider(NamedTuple):
    """An upstream service.  To add one: add a row; the accounts file can do it as well."""
    id: str
    dialect: str                    # key of DIALECTS (room 15)
    base_urls: tuple[str, ...]      # in order of preference
    auth: str                       # of AUTH_KINDS; `google` takes keys and tokens of Vertex
    envelope: str                   # which Cloud Code wrapping: antigravity, gemini-cli, none
    catalogue: str                  # how it names models: on_cloud_code, key_id, cli_id, vertex,
                                    # as asked
    user_agent: str                 # {os} and {arch} in Go's naming
    token_url: str = ""
    client_id: str = ""             # an OAuth client comes from the owner, never from here
    client_secret: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    signature_tag: str = ""         # signatures do not travel between upstream services
    policy: str = ""                # said at start, where the terms have something against us
    auth_url: str = ""              # of the browser sign-in
    userinfo_url: str = ""
    scopes: str = ""
    redirect: str = ""              # {port} is the listener's
    ports: tuple[int, ...] = ()     # tried in order, then any free one
    pools: tuple[str, ...] = ()     # further providers that the same sign-in may use, in order
    names: tuple[str, ...] = ()     # patterns of model names that it takes as they are asked for
    stand_ins: tuple[str, ...] = ()     # ... with models of its own, when nobody else can serve
    quirks: tuple[str, ...] = ()    # of QUIRKS
    endpoints: tuple[tuple[str, tuple[str, ...]], ...] = ()     # (dialect, base URLs) it has beside
    variables: tuple[str, ...] = ()     # of the environment, whose key makes an account by itself
    quota: str = ""                 # URL of a free reading of what is left
    quota_form: str = ""            # key of QUOTA_FORMS (room 14)

    def speaking(self, dialect: str) -> Provider:
        """The row for a client of that language: with its own endpoint where the service has one,
        so that nothing needs to be translated."""
        urls = dict(self.endpoints).get(dialect) if dialect != self.dialect else None
        return self._replace(dialect=dialect, base_urls=urls) if urls else self


QUIRKS = {      # where a compatible service differs from its model, one word a difference
    "unsigned_thinking": "wants its own thinking back although no signature is on it",
    "no_count": "has no /v1/messages/count_tokens",
    "no_search": "does not search the web by itself",
    "no_images": "takes no images",
    "no_cache_control": "refuses marks for its prompt cache",
    "no_json_schema": "takes no schema for an answer, only `json_object`",
    "no_stream_options": "refuses to tell usage in streams",
    "no_parallel_flag": "refuses `parallel_tool_calls`",
    "tool_choice_basic": "takes `auto` and `none` only for `tool_choice`",
    "completion_limit": "wants `max_completion_tokens` in place of `max_tokens`",
    "reasoning_replay": "wants the reasoning of earlier turns with calls back",
    "inline_think": "thinks inside `<think>` in the text",
    "no_effort": "has no switch for thinking",
    "thinking_type": "switches thinking by `thinking: {type}`",
    "enable_thinking": "switches thinking by `enable_thinking` and `thinking_budget`",
    "template_thinking": "switches thinking by `chat_template_kwargs`",
    "initiator": "is told by `X-Initiator` whether a person or a tool spoke last",
    "reasoning_object": "takes `reasoning: {effort or max_tokens}`",
}
DIALECT_IDS = ("gemini", "anthropic", "chat", "responses")      # that an upstream can speak
AUTH_KINDS = ("oauth", "x-goog-api-key", "x-api-key", "bearer", "google")
KEYLESS = ("ollama", "lmstudio", "vllm", "llamacpp")        # servers of one's own want no key

_GOOGLE = {"auth_url": "https://accounts.google.com/o/oauth2/v2/auth",
           "token_url": "https://oauth2.googleapis.com/token",
           "userinfo_url": "https://www.googleapis.com/oauth2/v1/userinfo?alt=json"}
_AGENT = "agproxy/" + VERSION


def _compatible(name: str, url: str, tag: str, variable: str = "", *names: str,
                quirks: tuple = (), quota: str = "", quota_form: str = "",
                **endpoints: str) -> Provider:
    """The row of a service that speaks Chat and perhaps more, with a key of its own or none."""
    return Provider(name, "chat", (url,), "bearer", "", "as asked", _AGENT, signature_tag=tag,
                    names=names, quirks=quirks, quota=quota, quota_form=quota_form,
                    variables=(variable,) * bool(variable),
                    endpoints=tuple((dialect, (u,)) for dialect, u in endpoints.items()))


# services whose models think in Anthropic's and OpenAI's words, and sign nothing
_UNSIGNED = ("thinking_type", "reasoning_replay", "unsigned_thinking", "no_count", "no_search")
_SCOPE = "https://www.googleapis.com/auth/"
CLOUD_SCOPE, GOOGLE_AUDIENCE = _SCOPE + "cloud-platform", _GOOGLE["token_url"]
_SCOPES = f"{_SCOPE}cloud-platform {_SCOPE}userinfo.email {_SCOPE}userinfo.profile"
PROVIDERS = {row.id: row for row in (
    Provider("antigravity", "gemini",
             ("https://daily-cloudcode-pa.googleapis.com", "https://cloudcode-pa.googleapis.com"),
             "oauth", "antigravity", "on_cloud_code", "antigravity/hub/2.9.1 {os}/{arch}",
             signature_tag="a", **_GOOGLE,
             scopes=f"{_SCOPES} {_SCOPE}cclog {_SCOPE}experimentsandconfigs",
             redirect="http://localhost:{port}/oauth-callback", ports=tuple(range(51121, 51127)),
             pools=("gemini-cli",),
             policy="Google's terms do not allow third-party clients on this sign-in; "
                    "accounts have been disabled for it."),
    Provider("gemini-cli", "gemini", ("https://cloudcode-pa.googleapis.com",), "oauth",
             "gemini-cli", "cli_id", "GeminiCLI/0.61.0/{model} ({os}; {arch}; terminal)",
             signature_tag="c", **_GOOGLE, scopes=_SCOPES,
             redirect="http://127.0.0.1:{port}/oauth2callback",
             policy="Google serves this sign-in to its own clients, since June 2026 with Standard "
                    "and Enterprise licences only; third-party use may cost the account."),
    Provider("gemini", "gemini", ("https://generativelanguage.googleapis.com",),
             "x-goog-api-key", "", "key_id", _AGENT, signature_tag="k",
             variables=("GEMINI_API_KEY", "GOOGLE_API_KEY")),
    Provider("vertex", "gemini", ("https://aiplatform.googleapis.com",), "google", "", "vertex",
             _AGENT, signature_tag="v", token_url=_GOOGLE["token_url"]),
    Provider("anthropic", "anthropic", ("https://api.anthropic.com",), "x-api-key", "", "as asked",
             _AGENT, names=("claude-*",), variables=("ANTHROPIC_API_KEY",)),
    Provider("openai", "responses", ("https://api.openai.com/v1",), "bearer", "", "as asked",
             _AGENT, "", "", "", signature_tag="o", quirks=("completion_limit",),
             names=("gpt-[0-9]*", "o[1-9]*", "chatgpt-*", "codex-*"),
             endpoints=(("chat", ("https://api.openai.com/v1",)),), variables=("OPENAI_API_KEY",)),
    Provider("zai", "anthropic", ("https://api.z.ai/api/anthropic",), "x-api-key", "", "as asked",
             _AGENT, names=("glm-*",), stand_ins=("claude-*",), signature_tag="z",
             quirks=(*_UNSIGNED, "tool_choice_basic", "no_json_schema"),
             endpoints=(("chat", ("https://api.z.ai/api/paas/v4",)),), variables=("ZAI_API_KEY",)),
    Provider("zai-plan", "anthropic", ("https://api.z.ai/api/anthropic",), "bearer", "", "as asked",
             _AGENT, names=("glm-*",), stand_ins=("claude-*",), signature_tag="zp",
             quirks=(*_UNSIGNED, "tool_choice_basic", "no_json_schema"),
             endpoints=(("chat", ("https://api.z.ai/api/coding/paas/v4",)),
                        ("responses", ("https://api.z.ai/api/v1",))),
             quota="https://api.z.ai/api/monitor/usage/quota/limit", quota_form="zai",
             policy="A Z.AI Coding Plan is sold for the coding tools its documents list."),
    _compatible("openrouter", "https://openrouter.ai/api/v1", "or", "OPENROUTER_API_KEY", "*/*",
                anthropic="https://openrouter.ai/api", responses="https://openrouter.ai/api/v1",
                quirks=("reasoning_object", "reasoning_replay", "no_count", "no_search"),
                quota="https://openrouter.ai/api/v1/key", quota_form="openrouter"
                )._replace(auth_url="https://openrouter.ai/auth", ports=(3000,),
                           redirect="http://localhost:{port}/callback",
                           token_url="https://openrouter.ai/api/v1/auth/keys"),
    _compatible("moonshot", "https://api.moonshot.ai/v1", "mo", "MOONSHOT_API_KEY", "kimi-*",
                "moonshot-*", anthropic="https://api.moonshot.ai/anthropic",
                responses="https://api.moonshot.ai/v1", quirks=_UNSIGNED,
                quota="https://api.moonshot.ai/v1/users/me/balance", quota_form="balance"),
    _compatible("kimi", "https://api.kimi.com/coding/v1", "ki", "KIMI_API_KEY", "kimi-for-coding*",
                anthropic="https://api.kimi.com/coding", quirks=_UNSIGNED,
                quota="https://api.kimi.com/coding/v1/usages", quota_form="kimi"),
    _compatible("minimax", "https://api.minimax.io/v1", "mm", "MINIMAX_API_KEY", "minimax-*",
                anthropic="https://api.minimax.io/anthropic",
                responses="https://api.minimax.io/v1",
                quirks=("reasoning_replay", "unsigned_thinking", "inline_think", "no_effort",
                        "no_count", "no_search")),
    _compatible("deepseek", "https://api.deepseek.com", "ds", "DEEPSEEK_API_KEY", "deepseek-*",
                anthropic="https://api.deepseek.com/anthropic",
                quirks=(*_UNSIGNED, "no_json_schema", "no_images"),
                quota="https://api.deepseek.com/user/balance", quota_form="balance"),
    _compatible("qwen", "https://dashscope-intl.aliyuncs.com/compatible-mode/v1", "qw",
                "DASHSCOPE_API_KEY", "qwen*", "qwq*",
                anthropic="https://dashscope-intl.aliyuncs.com/apps/anthropic",
                responses="https://dashscope-intl.aliyuncs.com/compatible-mode/v1",
                quirks=("enable_thinking", "no_count", "no_search")),
    _compatible("xai", "https://api.x.ai/v1", "x", "XAI_API_KEY", "grok-*",
                responses="https://api.x.ai/v1"),
    _compatible("mistral", "https://api.mistral.ai/v1", "mi", "MISTRAL_API_KEY", "mistral-*",
                "*stral-*", quirks=("no_effort", "no_stream_options")),
    _compatible("groq", "https://api.groq.com/openai/v1", "gr", "GROQ_API_KEY"),
    _compatible("copilot", "https://api.githubcopilot.com", "co", quirks=(
        "initiator", "no_count", "no_search"), anthropic="https://api.githubcopilot.com",
        responses="https://api.githubcopilot.com")._replace(
            policy="GitHub sells Copilot for the programs it lists; the token, and the headers by "
                   "which a program names itself, are its owner's to give."),
    _compatible("ollama", "http://localhost:11434/v1", "ol", quirks=(
        "no_parallel_flag", "no_count", "no_search", "no_cache_control"),
                anthropic="http://localhost:11434", responses="http://localhost:11434/v1"),
    _compatible("lmstudio", "http://localhost:1234/v1", "lm", quirks=(
        "no_parallel_flag", "no_count", "no_search"), responses="http://localhost:1234/v1",
        anthropic="http://localhost:1234"),
    _compatible("vllm", "http://localhost:8000/v1", "vl",
                quirks=("no_parallel_flag", "template_thinking"),
                responses="http://localhost:8000/v1"),
    _compatible("llamacpp", "http://localhost:8080/v1", "lc",
                quirks=("no_parallel_flag", "no_effort")),
    Provider("sim", "gemini", (), "oauth", "antigravity", "on_cloud_code", _AGENT,
             signature_tag="s"),
)}

EFFORT_BUDGETS = {"minimal": 0, "off": 0, "low": 1024, "medium": 8192, "high": 24576,
                  "xhigh": 32768, "max": 32768}
LEVEL_BY_BUDGET = ((512, "minimal"), (1024, "low"), (8192, "medium"), (1 << 30, "high"))

# ── 2. Errors ─────────────────────────────────────────────────────────────
# One exception, one table.  A kind says what happened; its row says what the
# client is told, what rests, for how long, and what is done next.


class Scope(enum.Enum):
    """What a failure counts against."""
    NOTHING = "nothing"
    CANDIDATE = "account+model"
    ACCOUNT = "account"
    PAIR = "account+pool"
    CAPACITY = "pool+model"
    HOST = "host"
    POOL = "pool"


class Step(enum.Enum):
    """What the conductor does after a failed try."""
    CLIENT = "answer the client"
    NEXT = "next candidate"
    AGAIN = "same candidate once, then next"
    ONE_MORE = "same candidate once, then one other"
    HOST = "next host, then next candidate"
    REFRESH = "refresh the token once, then next"
    DISCOVER = "look its project up again once, then next"
    REPAIR = "repair what was refused, then once more"


class Rule(NamedTuple):
    status: int             # towards the client
    type: str               # Anthropic error.type
    scope: Scope = Scope.NOTHING
    rest: str = ""          # row of GUESSED_REST_S; "stop" rests until a person acts
    step: Step = Step.CLIENT
    pause_s: float = 0      # before the same candidate is asked again


_BAD, _API = "invalid_request_error", "api_error"
ERRORS = {
    # the client's own requests
    "invalid_request": Rule(400, _BAD),
    "authentication": Rule(401, "authentication_error"),
    "forbidden": Rule(403, "permission_error"),
    "not_found": Rule(404, "not_found_error"),
    "method": Rule(405, _BAD),
    "slow_client": Rule(408, "timeout_error"),
    "too_large": Rule(413, "request_too_large"),
    "line_too_long": Rule(414, _BAD),
    "media_type": Rule(415, _BAD),
    "head_too_large": Rule(431, _BAD),
    "locked_out": Rule(429, "rate_limit_error"),
    "internal": Rule(500, _API),
    "busy": Rule(503, _API),
    "full": Rule(529, "overloaded_error"),
    # what an upstream's answer means
    "quota": Rule(429, "rate_limit_error", Scope.CANDIDATE, "quota", Step.NEXT),
    "rate": Rule(429, "rate_limit_error", Scope.CANDIDATE, "rate", Step.NEXT),
    "soft_429": Rule(429, "rate_limit_error", Scope.CANDIDATE, "soft", Step.ONE_MORE, 1.0),
    "capacity": Rule(529, "overloaded_error", Scope.CAPACITY, "capacity", Step.HOST, 1.0),
    "server": Rule(502, _API, Scope.HOST, "host", Step.HOST),
    "network": Rule(502, _API, Scope.HOST, "host", Step.HOST),
    "stall": Rule(504, "timeout_error", Scope.HOST, "host", Step.HOST),
    "auth_expired": Rule(403, "permission_error", Scope.ACCOUNT, "stop", Step.REFRESH),
    "revoked": Rule(403, "permission_error", Scope.ACCOUNT, "stop", Step.NEXT),
    "no_secret": Rule(403, "permission_error", Scope.ACCOUNT, "token", Step.NEXT),
    "token_endpoint": Rule(502, _API, Scope.ACCOUNT, "token", Step.NEXT),
    "validation": Rule(403, "permission_error", Scope.ACCOUNT, "stop", Step.NEXT),
    "disabled": Rule(403, "permission_error", Scope.ACCOUNT, "stop", Step.NEXT),
    "project": Rule(403, "permission_error", Scope.PAIR, "hour", Step.DISCOVER),
    "absent": Rule(403, "permission_error", step=Step.NEXT),
    "region": Rule(403, "permission_error", Scope.CANDIDATE, "hour", Step.NEXT),
    "model_missing": Rule(404, "not_found_error", Scope.CANDIDATE, "hour", Step.NEXT),
    "entitlement": Rule(429, "rate_limit_error", Scope.CANDIDATE, "day", Step.NEXT),
    "version": Rule(503, _API, Scope.POOL, "version", Step.NEXT),
    "signature": Rule(400, _BAD, step=Step.REPAIR),
    "pairing": Rule(400, _BAD, step=Step.REPAIR),
    "form": Rule(400, _BAD, step=Step.REPAIR),
    "denied": Rule(403, "permission_error", Scope.CANDIDATE, "hour", Step.NEXT),
    "no_search": Rule(400, _BAD),
    "too_long": Rule(400, _BAD),
    "bad_request": Rule(400, _BAD),
    "no_response": Rule(400, _BAD),
    "empty": Rule(529, "overloaded_error", step=Step.AGAIN, pause_s=0.5),
    "cut": Rule(502, _API, step=Step.ONE_MORE, pause_s=0.5),
    "timeout": Rule(504, "timeout_error"),
    # what the pool as a whole says
    "exhausted": Rule(429, "rate_limit_error"),
    "no_account": Rule(403, "permission_error"),
    "stopping": Rule(529, "overloaded_error"),
}
# failures of these rests and kinds mark their candidate for long: they cost none of the tries
LONG_RESTS = ("hour", "day")
LOGIN_KINDS = frozenset(("auth_expired", "revoked", "validation", "disabled", "absent"))


class ProxyError(Exception):
    """A failure with a name.  `kind` is a key of ERRORS; `delay_s` is what an upstream stated
    (None where it stated nothing), `retry_after_s` is what the client is told."""

    def __init__(self, kind: str, message: str, retry_after_s: float | None = None,
                 delay_s: float | None = None):
        super().__init__(message)
        self.kind, self.message, self.rule = kind, message, ERRORS[kind]
        self.retry_after_s, self.delay_s = retry_after_s, delay_s
        self.details: dict = {}     # what else the client is to read, in its own words
        # (status, body, headers) of an upstream of the client's own language, to go as they are
        self.verbatim: tuple | None = None
        self.headers: dict = {}     # limits that the upstream told with it
        self.retry_at = 0.0         # epoch seconds of `retry_after_s`, where whoever tells it knows


class ConfigError(Exception):
    """The accounts file or an option is wrong; the text names the field and what is allowed."""


class ClientGone(Exception):
    """The client hung up: nothing is left to answer, nothing is to be retried."""


class UpstreamFault(Exception):
    """An error object inside a 200 stream; `body` is that object, not yet understood."""

    def __init__(self, body: Any):
        super().__init__("error event in the stream")
        self.body = body


def invalid(path: str, message: str) -> ProxyError:
    """The 400 for a field of the client's body, worded `path: message` as the real API does."""
    return ProxyError("invalid_request", f"{path}: {message}" if path else message)


# ── 3. Small tools ────────────────────────────────────────────────────────
# Clock, ids, JSON, files and redaction: pure mechanics that know nothing of
# what the program is for.


class Clock:
    """The time, handed in everywhere so that tests can play a month in a second."""

    def now(self) -> float:
        """Wall clock, epoch seconds: for what must outlive a restart."""
        return time.time()

    def monotonic(self) -> float:
        """Seconds that never jump: for deadlines."""
        return time.monotonic()


def ordered(items: Iterable, seed: str, weight: Callable[[Any], float] = lambda _: 1.0) -> list:
    """`items` in a random order that a seed decides; what weighs more is first more often."""
    draw = random.Random(seed)
    keyed = [(draw.random() ** (1 / weight(i)) if weight(i) > 0 else 0.0, i) for i in items]
    return [item for _, item in sorted(keyed, key=lambda pair: -pair[0])]


def jitter(seconds: float, share: float = 0.2) -> float:
    """`seconds`, up to `share` more or less, so that several do not come in step."""
    return seconds * (1 - share + 2 * share * random.random())


_VARIANT = re.compile(r"(.+?)\s*(?:\((\w+|-1)\)|-(minimal|low|medium|high|xhigh|max))\Z", re.I)


@functools.lru_cache(maxsize=256)
def split_variant(name: str) -> tuple[str, str]:
    """(name, word) of `name(high)`, `name(16384)`, `name(off)`, `name(auto)`, `name-high`; a name
    of the catalogue with such an ending is just that, and has no word."""
    match = _VARIANT.match(WINDOW_MARK.sub("", name))
    plain = WINDOW_MARK.sub("", name).lower().rpartition("/")[2]
    if not match or plain in ALIASES or {plain, plain.replace("claude-", "", 1)} & MODELS.keys():
        return name, ""
    base, word = match[1], (match[2] or match[3]).lower()
    known = base.lower().rpartition("/")[2]
    if match[3] and not (known in MODELS or known in TIERS or known.startswith("claude")
                         or any(fnmatch.fnmatchcase(known, p) for p in ALIASES)):
        return name, ""
    is_word = word in EFFORT_BUDGETS or word in ("none", "-1", "auto") or word.isdecimal()
    return (base, word) if is_word else (name, "")


_BASE62 = (string.ascii_letters + string.digits).encode()
_TO_BASE62 = bytes(_BASE62[n % 62] for n in range(256))


_RANDOM: collections.deque = collections.deque()       # of 24 bytes each


def random_bytes() -> bytes:
    """24 random bytes; the system is asked for 256 ids at once: 0.3 us each against 11 where its
    code is cold."""
    try:
        return _RANDOM.pop()
    except IndexError:
        many = os.urandom(24 * 256)
        _RANDOM.extend(many[at:at + 24] for at in range(24, len(many), 24))
        return many[:24]


def new_id(prefix: str) -> str:
    """`prefix` and 24 base-62 characters, as the real API's ids look."""
    return prefix + random_bytes().translate(_TO_BASE62).decode("ascii")


def content_key(word: str, text: str) -> str:
    """Under what a memory keeps something about a text, when the text itself is all that is known
    of it later."""
    return word + " " + hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:32]


def base64url(data: bytes) -> str:
    """Base64 for addresses and tokens (RFC 7515): no padding."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


# ASCII output costs less than UTF-8: no wide string is built, and encode() cannot fail.
_ENCODER = json.JSONEncoder(separators=(",", ":"), check_circular=False)
_MAKE = getattr(json.encoder, "c_make_encoder", None)      # CPython's own
# made once: JSONEncoder.encode makes it again, 0.7 us a call of 1.3
_ENCODE = _MAKE and _MAKE(None, _ENCODER.default, quote, None, ":", ",", False, False, True)


def json_encode(value: Any) -> str:
    return "".join(_ENCODE(value, 0)) if _ENCODE else _ENCODER.encode(value)


def _tell(value: Any, told: Mapping[int, tuple], out: list[str]) -> None:
    known = told.get(id(value))
    if known is None:
        out.append(json_encode(value))
    elif known[1] is not None:
        out.append(known[1])
    elif isinstance(value, dict):
        comma = "{"
        for name, member in value.items():
            out.append(f"{comma}{quote(name)}:")
            _tell(member, told, out)
            comma = ","
        out.append("}")
    else:
        comma = "["
        for member in value:
            out.append(comma)
            _tell(member, told, out)
            comma = ","
        out.append("]")


def json_encode_told(value: Any, told: Mapping[int, tuple]) -> str:
    """The JSON of a value, of whose members that of some is known: `told` maps the id of a member
    to (the member, its JSON), and that of what is not empty and holds such to (that, None).  A
    conversation of 130 KB costs 60 us in place of 580."""
    if not told:
        return json_encode(value)
    out: list[str] = []
    _tell(value, told, out)
    return "".join(out)


def _json_int(digits: str) -> int:
    if len(digits) > MAX_JSON_DIGITS:
        raise ValueError(f"a number of more than {MAX_JSON_DIGITS} digits")
    return int(digits)


def refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is not JSON")


def finite(digits: str) -> float:
    """A number as JSON can tell it again: Python reads 1e999 as infinity."""
    value = float(digits)
    if value - value != 0:
        raise ValueError(f"{digits} is out of range")
    return value


_DECODER = json.JSONDecoder(parse_int=_json_int, parse_float=finite,
                            parse_constant=refuse_constant)
_SURROGATES = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
                         r"|(\\u[dD][89a-fA-F][0-9a-fA-F]{2})|\\.", re.S)


def _without_halves(text: str) -> str:
    """JSON with U+FFFD in place of lone surrogates; its length stays."""
    if "\\u" in text and ("\\ud" in text or "\\uD" in text):     # most bodies have no \u at all
        return _SURROGATES.sub(lambda m: "\\ufffd" if m[1] else m[0], text)
    return text


def json_decode(raw: bytes) -> Any:
    """Strict JSON: UTF-8, no NaN, bounded integers; lone surrogates become U+FFFD.
    Raises ValueError with a sentence for whatever is wrong."""
    try:
        return _DECODER.decode(_without_halves(raw.decode("utf-8")))
    except UnicodeDecodeError as err:
        raise ValueError(f"not UTF-8 at byte {err.start}") from err
    except RecursionError as err:
        raise ValueError("nested too deeply") from err


_GAP = re.compile(r"[ \t\r\n]*")


def _past_comma(text: str, at: int, close: str) -> int:
    """Where the next member begins behind one that ends at `at`, or the bracket stands."""
    at = _GAP.match(text, at).end()
    if text[at] == ",":
        at = _GAP.match(text, at + 1).end()
        if text[at] != close:
            return at
    elif text[at] == close:
        return at
    raise ValueError("no comma")


def json_items(text: str, at: int) -> tuple[list, list[int], int]:
    """(items, where each ends, where the list ends) of the list at `at`.  Raises what `scan_once`
    does, ValueError or IndexError where it is none."""
    gap, scan, values, ends = _GAP.match, _DECODER.scan_once, [], []
    at = gap(text, at + 1).end()
    while text[at] != "]":
        value, at = scan(text, at)
        values.append(value)
        ends.append(at)
        at = _past_comma(text, at, "]")
    return values, ends, at + 1


# Bodies of a conversation repeat: the next one begins its lists with what the last one had there.
# member -> how many of its last items count as new: clients move marks of theirs with the end
BODY_LISTS = {"messages": 3, "contents": 3, "input": 3, "system": 0, "tools": 0}
LEAST_BODY_BYTES = 4096             # below that nothing is gained
MOST_BODY_BYTES = 16 << 20          # remembered in all, as JSON; with what is made of it four times
MOST_ALIKE = 64                     # lists that begin alike: of agents that one client starts
_FIRST_BYTES, _MORE_BYTES, _STARTS = 160, 4096, 16
_LONGEST_START = 64                 # of a list: its name, and gaps up to the bracket


def _renew(rows: dict, key: bytes, value: Any) -> None:
    """Puts a row last; the one that was put longest ago makes room."""
    rows.pop(key, None)
    rows[key] = value
    if len(rows) > _STARTS:
        del rows[next(iter(rows))]


class KeptList(list):
    """A list of a body.  `made` has a place for what a parser makes of each of its first items:
    the same items, at the same places, stand in later bodies of the conversation."""
    made: list

    def __init__(self, items: Iterable, made: list):
        super().__init__(items)
        self.made = made


class _Seen:
    """The first items of a list of an earlier body: `raw` from the bracket on, in which item n
    ends at `ends[n]`.  `after` is how the next list of that body began, b"" for none."""
    __slots__ = ("raw", "first", "ends", "values", "made", "after")

    def __init__(self, raw: bytes, ends: list[int], values: list, made: list):
        self.raw, self.ends, self.values, self.made = raw, ends, values, made
        self.first, self.after = raw[:ends[0]], b""

    def count(self, raw: bytes, at: int) -> int:
        """How many of the items stand at a place of another body; perhaps not all that do."""
        if not raw.startswith(self.first, at):
            return 0
        count = len(self.ends)
        while count > 1 and not raw.startswith(self.raw[:self.ends[count - 1]], at):
            count //= 2
        return count


class BodyMemory:
    """Decodes bodies, and parses again only what no earlier body had at that place: the bytes are
    compared (megabytes in some 50 us).  What it gives is shared and must not be changed.  The lock
    guards all of it; `_seen` has the oldest first."""

    def __init__(self, most_bytes: int = MOST_BODY_BYTES):
        self.most_bytes = most_bytes
        self._lock = threading.Lock()
        self._seen: dict[tuple, list[_Seen]] = {}       # (how it began, first bytes) -> newest last
        self._size = 0
        self._starts: dict[bytes, int] = {}     # how the first list of a body began, and where
        self._after: dict[bytes, bytes] = {}    # how a list begins -> how the next one did lately
        self._mark = os.urandom(12).hex()               # stands for known items; nobody can know it

    def decode(self, raw: bytes) -> Any:
        """As `json_decode` does."""
        if len(raw) < LEAST_BODY_BYTES:
            return json_decode(raw)
        cuts, parts, at = self._cuts(raw), [], 0
        for number, (begin, seen, count) in enumerate(cuts):
            parts += [raw[at:begin], b'["%s%d"' % (self._mark.encode(), number)]
            at = begin + seen.ends[count - 1]
        try:
            text = (b"".join([*parts, raw[at:]]) if cuts else raw).decode("utf-8")
            return self._read(text, cuts)
        except (ValueError, LookupError, StopIteration, RecursionError):
            return json_decode(raw)         # says what is wrong, if anything is

    def _cuts(self, raw: bytes) -> list[tuple[int, _Seen, int]]:
        """(where a list begins, what is known of it, how many of its items that holds for)."""
        with self._lock:
            starts = list(self._starts.items())
        found = [(at, start) for start, place in starts
                 for at in (raw.find(start, 0, place + _MORE_BYTES),) if at > 0]
        at, start = min(found, default=(-1, b""))
        cuts: list[tuple[int, _Seen, int]] = []
        for _ in BODY_LISTS:
            # a quote that nothing escapes begins a name, or what follows it is no JSON
            if at < 1 or raw[at - 1] not in b"{, \t\r\n":
                break
            begin = at + len(start) - 1
            seen, count = self._match(raw, begin, start)
            if seen is None:
                start = self._after.get(start, b"")
            else:
                cuts.append((begin, seen, count))
                start, begin = seen.after, begin + seen.ends[count - 1]
            at = raw.find(start, begin) if start else -1
        return cuts

    def _match(self, raw: bytes, begin: int, start: bytes) -> tuple[_Seen | None, int]:
        """What is known of the list that begins there, and for how many items."""
        key, best = (start, raw[begin:begin + _FIRST_BYTES]), (None, 0)
        with self._lock:
            rows = self._seen.pop(key, None)
            if rows is not None:
                self._seen[key] = rows          # the last used stands last
            rows = list(rows or ())
        tried = 0
        for seen in reversed(rows):
            count = seen.count(raw, begin)
            tried += count > 0
            if count and (best[0] is None or seen.ends[count - 1] > best[0].ends[best[1] - 1]):
                best = seen, count
            if count == len(seen.ends) or tried > 3:
                break
        return best

    def _read(self, text: str, cuts: list) -> dict:
        """The object that a text says; StopIteration, ValueError or IndexError where it is none."""
        gap, scan, body, left = _GAP.match, _DECODER.scan_once, {}, dict(enumerate(cuts))
        lists: list[tuple[int, bytes, _Seen | None]] = []
        sound = _without_halves(text)
        is_whole, text = sound == text, sound       # whole pairs stay as they are
        at = gap(text).end()
        if text[at] != "{":
            raise ValueError("no object")
        at = gap(text, at + 1).end()
        while text[at] != "}":
            begin = at
            key, at = scan(text, at)
            at = gap(text, at).end()
            if not isinstance(key, str) or text[at] != ":":
                raise ValueError("no member")
            at = gap(text, at + 1).end()
            if key in BODY_LISTS and text[at] == "[":
                start = text[begin:at + 1].encode("utf-8")
                body[key], seen, at = self._list(text, at, left, BODY_LISTS[key])
                if len(start) <= _LONGEST_START:
                    lists.append((begin, start, seen))
            else:
                body[key], at = scan(text, at)
            at = _past_comma(text, at, "}")
        if left or gap(text, at + 1).end() != len(text):    # known items stood somewhere else
            raise ValueError("no object")
        if is_whole and lists:
            self._keep(lists)
        return body

    def _list(self, text: str, at: int, left: dict,
              new: int) -> tuple[list, _Seen | None, int]:
        """(the list at that place, what is to be known of it, where it ends).  `new` is how many of
        its last items may differ next time; what was cut out is taken from `left`."""
        begin, (values, ends, end) = at, json_items(text, at)
        raw, known, made, bounds = b"", 0, [], []
        if values and isinstance(values[0], str) and values[0].startswith(self._mark):
            _, seen, known = left.pop(int(values[0][len(self._mark):]))
            begin, values = ends[0], seen.values[:known] + values[1:]
            made, bounds, raw = seen.made[:known], seen.ends[:known], seen.raw
            if len(values) - new <= known == len(seen.ends):
                return KeptList(values, seen.made), seen, end       # nothing more to be known
            ends = ends[1:]
        kept = max(len(values) - new, known)
        if not kept:
            return values, None, end
        size, parts = bounds[-1] if bounds else 0, []
        for stop in ends[:kept - known]:
            parts.append(text[begin:stop].encode("utf-8"))
            size, begin = size + len(parts[-1]), stop
            bounds.append(size)
        raw = b"".join([raw[:bounds[known - 1]] if known else b"", *parts])
        seen = _Seen(raw, bounds, values[:kept], made + [None] * (kept - known))
        return KeptList(values, seen.made), seen, end

    def _keep(self, lists: list[tuple[int, bytes, _Seen | None]]) -> None:
        """Remembers the lists of a body, (where it begins, how, what is known of it) of each."""
        place, start, _ = lists[0]
        nexts = [row[1] for row in lists[1:]] + [b""]
        with self._lock:
            _renew(self._starts, start, max(place, self._starts.get(start, 0)))
            for (_, start, seen), after in zip(lists, nexts):
                _renew(self._after, start, after)
                if seen is not None and (LEAST_BODY_BYTES // 4 <= len(seen.raw)
                                         <= self.most_bytes // 4):
                    seen.after = after
                    self._keep_one((start, seen.raw[:_FIRST_BYTES]), seen)
            while self._size > self.most_bytes:
                key = next(iter(self._seen))
                self._size -= len(self._seen[key].pop(0).raw)
                if not self._seen[key]:
                    del self._seen[key]

    def _keep_one(self, key: tuple, seen: _Seen) -> None:
        rows = self._seen.pop(key, [])
        # what this one goes on from is not needed beside it
        kept = [row for row in rows if row is not seen and not seen.raw.startswith(row.raw)]
        kept = [*kept, seen][-MOST_ALIKE:]
        self._size += sum(len(r.raw) for r in kept) - sum(len(r.raw) for r in rows)
        self._seen[key] = kept


BODIES = BodyMemory()


def told_by(escaped: str) -> str:
    """What the inside of a JSON string says; raises ValueError where it is none."""
    return scanstring(escaped + '"', 0)[0]


# The inside of a JSON string that may be copied as it is: not empty, no escape that is none, and
# no halves of surrogate pairs, which could meet their other half in another text.
PLAIN_TEXT = (r'(?!")[^"\\\x00-\x1f]*(?:\\(?:["\\/bfnrt]|u(?![dD][89a-fA-F])[0-9a-fA-F]{4})'
              r'[^"\\\x00-\x1f]*)*')


def ascii_insides(insides: list[str]) -> list[str]:
    """The insides of JSON strings as ASCII: one pass over all of them, 0.3 us each against 1."""
    joined = "\x01".join(insides)      # which no inside has
    if '\\"' in joined or "\\u0001" in joined:
        return [inside if inside.isascii() else quote(told_by(inside))[1:-1] for inside in insides]
    # quoted once more, each backslash is two: made one again from the left, escapes stay whole
    return quote(joined)[1:-1].replace("\\\\", "\\").split("\\u0001")


# made once: json.loads with these would make it again, 4 us a look
_TELLER = json.JSONDecoder(parse_float=finite, parse_constant=refuse_constant)


def json_told(text: str, otherwise: Any = None) -> Any:
    """The value of a text that is one JSON value, `otherwise` where it is none."""
    try:
        return _TELLER.decode(text)
    except (ValueError, RecursionError):
        return otherwise


def is_json(text: str) -> bool:
    """Whether a text is one JSON value."""
    return json_told(text, _TELLER) is not _TELLER


def json_depth_exceeds(value: Any, limit: int = MAX_JSON_DEPTH) -> bool:
    """Whether lists and objects nest deeper than `limit`; level by level, so it cannot overflow."""
    level = [value]
    for _ in range(limit + 1):
        level = [item for box in level if isinstance(box, (dict, list))
                 for item in (box.values() if isinstance(box, dict) else box)]
        if not level:
            return False
    return True


def json_spans(text: str, at: int = 0) -> Iterator[tuple[Any, int, int, int]]:
    """(key or index, where the member begins, where its value begins, where that ends) of each
    member of the object or list at `at`.  The text is known to be JSON."""
    gap, read = _GAP.match, json.JSONDecoder().raw_decode
    at = gap(text, at).end()
    is_object, index = text[at] == "{", 0
    at = gap(text, at + 1).end()
    while text[at] not in "}]":
        begin, key = at, index
        if is_object:
            key, at = read(text, at)
            at = gap(text, gap(text, at).end() + 1).end()       # past the colon
        _, end = read(text, at)
        yield key, begin, at, end
        index, at = index + 1, gap(text, end).end()
        if text[at] == ",":
            at = gap(text, at + 1).end()


def json_splice(text: str, changes: Mapping[str, str | None]) -> str:
    """`text`, a JSON object, with the named members' values replaced by other JSON, added, or taken
    out (None); everything else stays byte for byte."""
    left, out, done = dict(changes), [], 0
    for key, begin, at, end in json_spans(text) if left else ():
        if key not in left:
            continue
        value = left.pop(key)
        head = text[done:at if value is not None else begin]
        done = end
        if value is not None:
            head += value
        elif head.rstrip().endswith(","):
            head = head.rstrip()[:-1]
        else:               # the first member goes with the comma behind it
            done = re.compile(r"\s*,?\s*").match(text, end).end()
        out.append(head)
        if not left:
            break
    text = "".join(out) + text[done:]
    added = [f"{quote(key)}:{value}" for key, value in left.items() if value is not None]
    if added:
        body = text.rstrip()[:-1].rstrip()
        text = body + ("" if body.endswith("{") else ",") + ",".join(added) + "}"
    return text


# Redaction

# every secret this process has seen; only ever grows, and is read by list(), which is one step
# beside an add() also without the interpreter lock
_SECRETS: set[str] = set()
_SECRET_SHAPES = re.compile(
    r"ya29\.[\w.-]+|1//[\w-]{8,}|sk-[\w-]{8,}|GOCSPX-[\w-]+|AIza[\w-]{8,}"
    r"|(?i:(?:bearer|basic)\s+)[\w.~+/=-]{8,}|(?<=//)[^\s/@\"']+:[^\s/@\"']*(?=@)"
    r"|(?i:[?&](?:(?:api_?)?key|code|state|code_verifier|client_secret|(?:\w+_)?token)=)[^&\s\"']+")
_EMAIL = re.compile(r"\b[\w.+-]+@[\w-]+\.[\w.-]*\w")


def remember_secret(secret: str | None) -> None:
    """From now on `redact` removes this text wherever it turns up, as a URL, a form or JSON spells
    it too."""
    if secret and len(secret) >= 6:
        _SECRETS.update((secret, urllib.parse.quote(secret, ""), urllib.parse.quote(secret),
                         quote(secret)[1:-1]))


def holds_secret(text: str) -> bool:
    return any(secret in text for secret in list(_SECRETS))


def without_secrets(text: str) -> str:
    """`text` without secrets and e-mail addresses."""
    for secret in list(_SECRETS):
        if secret in text:
            text = text.replace(secret, "[secret]")
    text = _SECRET_SHAPES.sub("[secret]", text)
    return _EMAIL.sub("[e-mail]", text) if "@" in text else text


def redact(text: str, limit: int = 600) -> str:
    """`text` without secrets, e-mail addresses and control characters, cut at `limit`."""
    text = without_secrets(text)
    if not text.isprintable():
        text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= limit else text[:limit] + "..."


def cut(text: str, limit: int) -> str:
    """The beginning of `text`, which never holds half a secret: that would not be known as one."""
    return text if len(text) <= limit else without_secrets(text)[:limit]


def redact_all(value: Any) -> Any:
    """A JSON value with each of its texts redacted."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {name: redact_all(item) for name, item in value.items()}
    return [redact_all(item) for item in value] if isinstance(value, (list, tuple)) else value


# Files

@functools.lru_cache(maxsize=100)
def warn_once(text: str) -> None:
    print("agproxy: " + text, file=sys.stderr)


_NO_LINK = getattr(os, "O_NOFOLLOW", 0)         # Windows has none
SHARING_S = 1.0 if os.name == "nt" else 0.0     # there a reader holds up who replaces its file


def cause(err: Exception) -> str:
    """What an error says, for people: the system's without its number."""
    if not isinstance(err, OSError) or not err.strerror:
        return str(err)
    return f"{err.filename}: {err.strerror}" if err.filename else err.strerror


def patiently(call: Callable, *values: Any) -> Any:
    """What a call on a file answers, which another process may have open for a moment."""
    deadline = time.monotonic() + SHARING_S
    while True:
        try:
            return call(*values)
        except PermissionError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.02)


@contextlib.contextmanager
def file_lock(path: str, wait_s: float = 5) -> Iterator[None]:
    """Exclusive lock on `path`.lock between processes; the system frees it when we die."""
    handle = os.open(path + ".lock", os.O_RDWR | os.O_CREAT | _NO_LINK, 0o600)
    deadline = time.monotonic() + wait_s
    try:
        while True:
            try:
                if fcntl:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                else:
                    import msvcrt
                    msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
                break
            except OSError as err:
                if err.errno not in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
                    raise       # a file system without locks: nothing to wait for
                if time.monotonic() > deadline:
                    raise OSError(errno.EBUSY, "it is locked by another process") from err
                time.sleep(0.02)
        yield
    finally:
        os.close(handle)        # closing frees the lock, on Windows too


def write_atomic(path: str, data: bytes) -> None:
    """Replaces `path` as a whole, 0600, on disk when this returns; where it raises, the old file
    is there as it was."""
    path = os.path.realpath(path)       # a symlinked store keeps its link
    temporary = f"{path}.{os.getpid()}-{os.urandom(4).hex()}.tmp"
    with contextlib.ExitStack() as stack:
        if os.name == "posix":          # opened while nothing is changed yet
            folder = os.open(os.path.dirname(path), os.O_RDONLY)
            stack.callback(os.close, folder)
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_LINK, 0o600),
                      "wb") as handle:
                handle.write(data)
                handle.flush()
                os.fsync(handle.fileno())
            patiently(os.replace, temporary, path)
        except BaseException:                       # Ctrl-C too: it holds secrets
            with contextlib.suppress(OSError):      # the first error is the one to hear of
                os.unlink(temporary)
            raise
        if os.name == "posix":
            with contextlib.suppress(OSError):      # not every file system can; the file is there
                os.fsync(folder)


def close_to_others(path: str, handle: int | None = None) -> None:
    """A file that others may read is closed to them, which is said.  `handle` is of it, if open."""
    file = path if handle is None else handle
    if os.name != "posix" or not os.stat(file).st_mode & 0o077:
        return
    try:
        os.chmod(file, 0o600)
        print(f"agproxy: {path} could be read by others; it is 0600 now", file=sys.stderr)
    except OSError as err:      # not our file, or a mount that is read only
        warn_once(f"{path} can be read by others, which cannot be changed: {cause(err)}")


def set_aside(path: str) -> str:
    """Renames a damaged file; its new name, which no other one has."""
    aside = base = f"{path}.corrupt-{int(time.time())}"
    for number in itertools.count(2):
        if not os.path.lexists(aside):
            break
        aside = f"{base}-{number}"
    patiently(os.replace, path, aside)
    return aside


def sweep_temporaries(folder: str, begin: str = "") -> None:
    """Removes what killed writers left of files that begin so, once it is a minute old."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:   # no folder, nothing of ours
        for entry in entries:
            if entry.name.startswith(begin) and entry.name.endswith(".tmp"):
                with contextlib.suppress(OSError):      # another process swept it
                    if abs(time.time() - entry.stat(follow_symlinks=False).st_mtime) > 60:
                        os.unlink(entry.path)


def short_trace(err: BaseException) -> str:
    """Where an exception came from, innermost last, on one line."""
    steps = traceback.extract_tb(err.__traceback__)[-5:]
    way = " > ".join(f"{step.name}:{step.lineno}" for step in steps)
    return f"{type(err).__name__}: {err} at {way}"


def human_s(seconds: float) -> str:
    """A duration as people write it: 8s, 4m 10s, 2h 21m, 3d 4h."""
    seconds = max(0, int(seconds + 0.5))
    for size, unit, smaller, name in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"),
                                      (60, "m", 1, "s")):
        if seconds >= size:
            rest = seconds % size // smaller
            return f"{seconds // size}{unit} {rest}{name}" if rest else f"{seconds // size}{unit}"
    return f"{seconds}s"


_DURATION = re.compile(r"(?:(\d+)d)?\s*(?:(\d+)h)?\s*(?:(\d+)m(?!s))?\s*(?:(\d+(?:\.\d+)?)s)?"
                       r"\s*(?:(\d+(?:\.\d+)?)ms)?")


def parse_duration_s(text: str) -> float | None:
    """Seconds of a Go or protobuf duration (`2h21m25.8s`, `754.4ms`), None when it is none."""
    match = _DURATION.match(text.strip())
    if not match or not any(match.groups()):
        return None
    days, hours, minutes, seconds, ms = (float(g or 0) for g in match.groups())
    return days * 86400 + hours * 3600 + minutes * 60 + seconds + ms / 1000


_TIMESTAMP = re.compile(r"(\d{4})-(\d\d)-(\d\d)[T ](\d\d):(\d\d):(\d\d)(?:\.\d+)?"
                        r"(?:([+-])(\d\d):?(\d\d))?")


def parse_timestamp(text: str) -> float | None:
    """Epoch seconds of an RFC 3339 time; None when it is none."""
    match = _TIMESTAMP.search(text)
    if not match:
        return None
    import calendar
    try:
        at = calendar.timegm(tuple(int(g) for g in match.groups()[:6]) + (0, 0, 0))
    except (ValueError, OverflowError):
        return None
    offset_s = (int(match[8]) * 60 + int(match[9])) * 60 if match[7] else 0
    return float(at - offset_s if match[7] == "+" else at + offset_s)


def object_of(value: Any) -> dict:
    """`value` where it is a JSON object, else an empty one: for what others may write oddly."""
    return value if isinstance(value, dict) else {}


def objects_of(value: Any) -> list[dict]:
    """The JSON objects of a list; [] where it is none."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def letters_in(value: Any) -> int:
    """About the length of a value's JSON."""
    if isinstance(value, str):
        return len(value) + 2
    if isinstance(value, dict):
        return sum(len(name) + 4 + letters_in(v) for name, v in value.items()) + 2
    return sum(map(letters_in, value)) + 2 if isinstance(value, (list, tuple)) else 5


# Fields of a client's body: a wrong one is refused by its path

def list_at(value: Any, path: str) -> list:
    if not isinstance(value, list):
        raise invalid(path, "a list is required")
    return value


def text_at(value: Any, path: str) -> str:
    if not isinstance(value, str):
        raise invalid(path, "a string is required")
    return value


def dict_at(value: Any, path: str) -> dict:
    if not isinstance(value, dict):
        raise invalid(path, "an object is required")
    return value


def number_at(body: Mapping, name: str, low: float, high: float) -> float | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise invalid(name, f"a number from {low} to {high} is required")
    return value


def flag_at(body: Mapping, name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise invalid(name, "true or false is required")
    return value is True


def model_at(body: Mapping) -> str:
    """The name of the model a client asks for."""
    model = text_at(body.get("model"), "model")
    if not 0 < len(model) <= MAX_MODEL_NAME:
        raise invalid("model", f"from 1 to {MAX_MODEL_NAME} characters are required")
    return model


# ── 4. Config ─────────────────────────────────────────────────────────────
# What a person decides: settings, providers, accounts, aliases.  Read from
# accounts.json, validated field by field; secrets are resolved when asked for.

ACCOUNT_FIELDS = {          # field -> (types, what is allowed)
    "name": (str, "a label"), "provider": (str, "the id of a provider"),
    "email": (str, "text"), "project": (str, "a project id"), "enabled": (bool, "true or false"),
    "priority": (int, "a whole number, lower is first"), "weight": ((int, float), "a number"),
    "models": (list, "a list of model names"), "tags": (list, "a list of words"),
    "max_in_flight": (int, "a whole number"), "soft_limit": ((int, float), "a fraction, 0 is off"),
    "proxy": (str, "a URL"), "headers": (dict, "names and values"), "user_agent": (str, "text"),
    "refresh_token": (str, "a secret"), "access_token": (str, "a secret"),
    "api_key": (str, "a secret"),
}
CREDENTIALS = ("refresh_token", "access_token", "api_key")
FILE_VERSION = 1            # of the accounts file's form; one of a later form is left alone
STRATEGY_NAMES = ("hybrid", "sticky", "fill-first", "round-robin", "weighted")


class GroupItem(NamedTuple):
    """One member of a group: a model, another group, or either only by some accounts."""
    model: str
    provider: str = ""
    account: str = ""
    tag: str = ""
    weight: float = 1.0


class Group(NamedTuple):
    """A virtual model: its members in the order of a strategy."""
    strategy: str
    items: tuple[GroupItem, ...]


GROUP_STRATEGIES = ("priority", "random", "weighted", "round-robin")
MOST_MEMBERS = 200          # of a group, those of groups in it counted
ROUTE_ROLES = ("default", "background", "think", "long_context", "web_search", "image")
LONG_CONTEXT_TOKENS = 60_000        # of a long_context route that does not say


class Edit(NamedTuple):
    """A rule: where all of `when` holds, the request goes `to` another name, its body is changed,
    or a text stands before its system texts."""
    when: Mapping[str, Any]
    to: str = ""
    set: Mapping[str, Any] = {}         # path in the upstream's body -> value
    default: Mapping[str, Any] = {}     # the same where there is none
    drop: tuple[str, ...] = ()          # paths
    system: str = ""


CONDITIONS = {      # of a rule: what each looks at -> its type
    "model": str,               # pattern of the name asked for, or for changes of what serves
    "client": str, "upstream": str,     # dialects
    "provider": str,            # pattern of its id
    "headers": dict,            # name -> pattern
    "tool": str,                # pattern that a tool's name fits
    "over_tokens": int, "under_tokens": int, "has_tools": bool, "has_images": bool,
    "thinks": bool, "streams": bool}


class UserKey(NamedTuple):
    """One of a user's keys, of which only the hash is stored."""
    user: str
    key_hash: str           # scrypt:<salt hex>:<hash hex>
    hint: str = ""          # how the key ends: what ends otherwise is not worth the hashing
    expires_at: float = 0   # epoch seconds; 0 is never
    models: tuple[str, ...] = ()        # patterns of the names it may ask for; () is all
    admin: bool = False


@dataclass(frozen=True)
class Config:
    """The validated accounts file with flags and variables applied.
    `accounts` are plain dicts with the fields of ACCOUNT_FIELDS, secrets still unresolved."""
    path: str
    settings: dict[str, Any]
    providers: dict[str, Provider] = field(default_factory=lambda: dict(PROVIDERS))
    accounts: tuple[dict, ...] = ()
    aliases: dict[str, tuple[str, ...]] = field(default_factory=dict)
    groups: dict[str, Group] = field(default_factory=dict)
    routes: dict[str, tuple[str, int]] = field(default_factory=dict)    # role -> (name, tokens)
    rules: tuple[Edit, ...] = ()
    api_key: str = ""           # PROXY_API_KEY; without it and users loopback is served keyless
    users: tuple[UserKey, ...] = ()

    def __post_init__(self) -> None:
        vars(self).update(self.settings)    # each setting is an attribute: no look-up by a method


def config_path(flag: str | None, environ: Mapping[str, str]) -> str:
    """Where accounts.json is: flag, $ACCOUNTS_CONFIG_PATH, else the user's config folder."""
    if flag or environ.get("ACCOUNTS_CONFIG_PATH"):
        return os.path.expanduser(flag or environ["ACCOUNTS_CONFIG_PATH"])
    if os.name == "nt" and environ.get("APPDATA"):
        return os.path.join(environ["APPDATA"], "agproxy", "accounts.json")
    base = environ.get("XDG_CONFIG_HOME") or os.path.join(os.path.expanduser("~"), ".config")
    return os.path.join(base, "agproxy", "accounts.json")


def resolve_secret(text: str) -> str:
    """A secret as it is, or from `env:NAME`, `file:PATH`, `cmd:COMMAND`; redacted from now on."""
    kind, _, rest = text.partition(":")
    if kind == "env":
        value = os.environ.get(rest, "")
    elif kind == "file":
        try:
            with open(os.path.expanduser(rest), encoding="utf-8") as handle:
                value = handle.read().strip()
        except (OSError, ValueError) as err:
            raise ConfigError(f"secret file:{rest} cannot be read: {err}") from err
    elif kind == "cmd":
        try:
            done = subprocess.run(rest, shell=True, capture_output=True, text=True, timeout=30)
        except (OSError, ValueError, subprocess.SubprocessError) as err:
            raise ConfigError(f"secret cmd:... did not run: {type(err).__name__}") from err
        if done.returncode:
            raise ConfigError(f"secret cmd:... ended with {done.returncode}")
        value = done.stdout.strip()
    else:
        value = text
    if not value:
        raise ConfigError(f"secret {kind}:{rest if kind == 'env' else '...'} is empty")
    remember_secret(value)
    if value.startswith("{"):       # a key file of Google's
        with contextlib.suppress(ValueError):
            told = object_of(json_decode(value.encode()))
            for name in ("private_key", "refresh_token", "client_secret", "private_key_id"):
                remember_secret(str(told.get(name) or ""))
            return value
    if not re.fullmatch(r"[!-z|~][!-~]*", value):       # `{`: a key file that cannot be read
        raise ConfigError("a secret holds characters that cannot stand in a header")
    return value


def check_proxy(url: str, where: str) -> None:
    """Raises ConfigError for what is no proxy's URL."""
    try:
        parts = urllib.parse.urlsplit(url)
        is_known = parts.scheme in ("http", "socks5", "socks5h") and parts.hostname and (
            parts.port != 0)
        word = urllib.parse.unquote(parts.password or "")
        pair = f"{urllib.parse.unquote(parts.username or '')}:{word}"
        for secret in (word, parts.password, word and base64.b64encode(pair.encode()).decode()):
            remember_secret(secret)
    except ValueError:      # brackets that do not match, a port above 65535
        is_known = None
    if url != "direct" and not is_known:
        raise ConfigError(f"{where}: direct, http://host:port or socks5://host:port is required")


_SECRET_HEADER = re.compile(r"(?i)auth|key|token|secret|cookie|password|credential")


def check_headers(rows: Mapping, where: str) -> None:
    """Raises ConfigError for what cannot stand in a request's head; what their names tell to be
    secret is redacted from now on."""
    for name, value in rows.items():
        if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name) or (
                isinstance(value, (dict, list)) or not str(value).isprintable()):
            raise ConfigError(f"{where}: names and texts of one line are required")
        if _SECRET_HEADER.search(name):
            remember_secret(str(value).partition(" ")[2].strip() or str(value))


def _setting_value(name: str, value: Any, where: str) -> Any:
    """`value` in the type of the setting's default; raises ConfigError naming `where` it stood."""
    default = SETTINGS[name].default
    if isinstance(default, tuple):
        value = value.split(",") if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise ConfigError(f"{where}: a list of names is required")
        if name == "small_requests" and not set(value) <= {*SMALL_KINDS, ""}:
            raise ConfigError(f"{where}: of {', '.join(SMALL_KINDS)} only, not {value!r}")
        if name == "cors_origins" and not all(re.fullmatch(
                r"[a-z][a-z0-9+.-]*://[^/\s*]+", v.strip()) for v in value if v.strip()):
            raise ConfigError(f"{where}: whole origins are required, as https://a.example; `*` and "
                              "`null` would let any page in")
        return tuple(v.strip() for v in value if v.strip())
    if isinstance(default, bool):
        word = str(value).lower()
        if word not in ("true", "false", "1", "0", "yes", "no", "on", "off"):
            raise ConfigError(f"{where}: true or false is required, not {value!r}")
        return word in ("true", "1", "yes", "on")
    if isinstance(default, (int, float)) and not isinstance(value, bool):
        try:
            exact = int if isinstance(default, int) and not name.endswith("_s") else float
            value = exact(value)
        except (TypeError, ValueError, OverflowError):
            raise ConfigError(f"{where}: a number is required, not {value!r}") from None
        if not 0 <= value < 1e15 or (value == 0 and name.endswith("_s") and name != "max_wait_s"):
            raise ConfigError(f"{where}: a number above zero is required, not {value!r}")
        if name == "client_window_tokens" and 0 < value < 50_000:
            raise ConfigError(f"{where}: 0, or at least 50000 is required, not {value!r}")
        most = {"soft_limit": 0.99, "port": 65535}.get(name)
        if most is not None and value > most:
            raise ConfigError(f"{where}: at most {most} is allowed, not {value!r}")
        return value
    if not isinstance(value, str):
        wanted = "text" if isinstance(default, str) else "a number"
        raise ConfigError(f"{where}: {wanted} is required")
    words = {"strategy": STRATEGY_NAMES, "unknown_model": ("reject", "default", "pass")}.get(name)
    if words and value not in words:
        raise ConfigError(f"{where}: one of {', '.join(words)} is required, not {value!r}")
    if name == "proxy" and value:
        check_proxy(value, where)
    return value


def warn_unknown(names: Iterable[str], known: Iterable[str], where: str) -> None:
    """Says on stderr which names are not known, with the nearest that is."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), list(known), 1)
            warn_once(f"{where}{name} is not known" + (f"; {near[0]}?" if near else ""))


def config_settings(stored: Mapping, flags: Mapping, environ: Mapping[str, str]) -> dict[str, Any]:
    """Every setting by precedence: flag, variable, file, default."""
    warn_unknown(stored, SETTINGS, "settings.")
    found = {}
    for name, row in SETTINGS.items():
        variables = [v for v in (row.variable, "AGPROXY_" + name.upper()) if environ.get(v)]
        if flags.get(name) is not None:
            found[name] = _setting_value(name, flags[name], "--" + name.replace("_", "-"))
        elif variables:
            found[name] = _setting_value(name, environ[variables[0]], variables[0])
        elif name in stored:
            found[name] = _setting_value(name, stored[name], f"settings.{name}")
        else:
            found[name] = row.default
    return found


_TAILS = {      # what base URLs are pasted with and the paths here bring themselves
    "anthropic": r"(/v1)?(/messages)?/*\Z", "chat": r"(/chat/completions)?/*\Z",
    "responses": r"(/responses)?/*\Z", "gemini": r"(/v1beta)?(/models)?/*\Z"}


def _base_urls(value: Any, dialect: str, where: str) -> tuple[str, ...]:
    urls = [value] if isinstance(value, str) else value
    if not isinstance(urls, list) or not urls or not all(
            isinstance(u, str) and re.fullmatch(
                r"https?://([^/\s:@\[\]?#]+|\[[0-9a-fA-F:]+\])(:\d{1,5})?(/[^\s?#]*)?", u)
            and 0 < int((re.search(r":(\d+)(/|\Z)", u[8:]) or [0, 1])[1]) < 65536 for u in urls):
        raise ConfigError(f"{where}: a http(s) URL, or a list of them, is required")
    cut = [re.sub(_TAILS.get(dialect, r"/*\Z"), "", u) for u in urls]
    if dialect in ("chat", "responses"):        # OpenAI's own paths begin with it
        cut = [u + "/v1" if re.fullmatch(r"https?://[^/]+", u) else u for u in cut]
    return tuple(cut)


def _config_provider(name: str, cells: Any, known: Provider | None) -> Provider:
    """A built-in row with cells replaced, or a new row of a known dialect."""
    if not isinstance(cells, dict):
        raise ConfigError(f"providers.{name}: an object is required")
    row = known or Provider(name, "", (), "x-goog-api-key", "", "key_id", _AGENT,
                            signature_tag=hashlib.sha256(name.encode()).hexdigest()[:4])
    spoken = cells.get("endpoints")
    if known is None and "dialect" not in cells and isinstance(spoken, dict) and spoken:
        cells = {"dialect": next(iter(spoken)), **cells}
    own = str(cells.get("dialect", row.dialect))
    if isinstance(spoken, dict) and own in spoken:      # of its own language: its base URL
        cells = {"base_url": spoken[own], **cells}
    if known is None and cells.get("dialect") in ("anthropic", "chat", "responses"):
        row = row._replace(auth="x-api-key" if cells["dialect"] == "anthropic" else "bearer",
                           catalogue="as asked", names=("*",))
    dialect = str(cells.get("dialect", row.dialect))
    if known is not None and "base_url" in cells:       # the others would still be the vendor's
        row = row._replace(endpoints=(), quota="")
    for cell, value in cells.items():
        where = f"providers.{name}.{cell}"
        if cell == "base_url":
            row = row._replace(base_urls=_base_urls(value, dialect, where))
        elif cell == "endpoints" and isinstance(value, dict) and set(value) <= set(DIALECT_IDS):
            row = row._replace(endpoints=tuple((d, _base_urls(u, d, where)) for d, u in
                                               value.items() if d != dialect))
        elif cell == "headers" and isinstance(value, dict):
            check_headers(value, where)
            row = row._replace(headers=tuple((str(k), str(v)) for k, v in value.items()))
        elif cell in ("names", "stand_ins", "quirks") and isinstance(value, list) and all(
                isinstance(v, str) for v in value):
            warn_unknown(value, QUIRKS if cell == "quirks" else value, where + ": ")
            row = row._replace(**{cell: tuple(value)})
        elif cell in ("dialect", "auth", "user_agent", "token_url", "client_id", "client_secret",
                      "auth_url", "userinfo_url"):
            if not isinstance(value, str):
                raise ConfigError(f"{where}: text is required")
            row = row._replace(**{cell: value})
        else:
            raise ConfigError(f"{where} is not a cell that can be set")
    if row.auth not in AUTH_KINDS:
        raise ConfigError(f"providers.{name}.auth: one of {', '.join(AUTH_KINDS)} is required")
    if row.dialect not in DIALECT_IDS:
        raise ConfigError(f"providers.{name}.dialect: one of {', '.join(DIALECT_IDS)} is required, "
                          f"not {row.dialect!r}")
    return row


def _config_account(row: Any, where: str, providers: Mapping[str, Provider]) -> dict:
    """One validated account; raises ConfigError naming the field."""
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: an object is required")
    for name, value in row.items():
        types, allowed = ACCOUNT_FIELDS.get(name, (object, ""))
        is_bool_for_number = isinstance(value, bool) and types in (int, (int, float))
        if not isinstance(value, types) or is_bool_for_number:
            raise ConfigError(f"{where}.{name}: {allowed} is required")
    if not 0 <= row.get("soft_limit", 0) < 1 or min(row.get("weight", 1),
                                                    row.get("max_in_flight", 0)) < 0:
        raise ConfigError(f"{where}: weight and max_in_flight are 0 or more, soft_limit below 1")
    if not all(isinstance(m, str) for m in row.get("models", ())):
        raise ConfigError(f"{where}.models: a list of model names is required")
    if not row.get("name", "x").isprintable() or not row.get("name", "x").strip("@ "):
        raise ConfigError(f"{where}.name: a label in visible characters is required")
    if row.get("proxy"):
        check_proxy(row["proxy"], where + ".proxy")
    check_headers(row.get("headers", {}), where + ".headers")
    check_headers({"User-Agent": row.get("user_agent", "")}, where + ".user_agent")
    warn_unknown(row, ACCOUNT_FIELDS, where + ".")
    if row.get("provider") not in providers:
        raise ConfigError(f"{where}.provider: one of {', '.join(providers)} is required")
    if not providers[row["provider"]].base_urls:
        raise ConfigError(f"{where}.provider: {row['provider']} has no base_url")
    given = [name for name in CREDENTIALS if row.get(name)]
    auth = providers[row["provider"]].auth
    if not given and (row["provider"] not in PROVIDERS or row["provider"] in KEYLESS) and (
            auth != "oauth"):
        return dict(row)            # a server of one's own may want no key
    if len(given) != 1:
        raise ConfigError(f"{where}: exactly one of {', '.join(CREDENTIALS)} is required")
    is_key = given == ["api_key"]
    if auth != "google" and is_key != (auth != "oauth"):
        raise ConfigError(f"{where}: {row['provider']} takes "
                          f"{'a refresh_token or access_token' if is_key else 'an api_key'}")
    return dict(row)


def _each_once(pairs: list[tuple]) -> dict:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise ValueError("a name stands twice in one object")   # written back, one would be lost
    return members


def _parse_accounts(raw: bytes) -> dict:
    raw = raw[3:] if raw.startswith(b"\xef\xbb\xbf") else raw     # editors of Windows begin so
    stored = json_decode(raw)
    if not isinstance(stored, dict) or json_depth_exceeds(stored):
        raise ValueError("an object is required" if not isinstance(stored, dict) else "too deep")
    json.loads(raw, object_pairs_hook=_each_once)
    return stored


def _accounts_bytes(path: str) -> bytes:
    with patiently(open, path, "rb") as handle:
        close_to_others(path, handle.fileno())
        return handle.read()


def _recovered(path: str, why: str) -> dict:
    """The last good version, which stands in the damaged or lost file's place from now on."""
    try:
        good = _accounts_bytes(path + ".bak")
        stored = _parse_accounts(good)
    except (OSError, ValueError) as err:
        raise ConfigError(f"{path} is {why}, and {path}.bak cannot be used: {cause(err)}") from err
    try:
        with file_lock(path):
            with contextlib.suppress(OSError, ValueError):      # mended in the meantime?
                return _parse_accounts(_accounts_bytes(path))
            if os.path.lexists(path):
                why += f", set aside as {set_aside(path)}"
            write_atomic(path, good)
    except OSError as err:      # a full disk, a folder that is read only: serving goes on
        why += f", and cannot be replaced ({cause(err)})"
    print(f"agproxy: {path} was {why}; the last good version is used", file=sys.stderr)
    return stored


def read_accounts_file(path: str, recovers: bool = False) -> dict:
    """The stored object, {} when there is no file.  A damaged or lost one raises ConfigError, and
    nothing is changed; with `recovers` the last good version is used then, the damaged one set
    aside, and both are named."""
    path = os.path.realpath(path)       # its neighbours are those of the store, not of a link
    has_copy = os.path.exists(path + ".bak")
    try:
        return _parse_accounts(_accounts_bytes(path))
    except FileNotFoundError:
        if not has_copy:
            return {}
        why = "missing"
    except OSError as err:
        raise ConfigError(f"{path}: {err.strerror}") from err
    except ValueError as err:
        why = f"damaged ({err})"
    if recovers and has_copy:
        return _recovered(path, why)
    raise ConfigError(f"{path} is {why}; mend it, nothing was changed.  " + (
        f"The last good version is kept in {path}.bak" if has_copy else "There is no copy of it"))


def default_name(row: Mapping, position: int) -> str:
    """The label of an account in the file: its name, else provider and place."""
    return row.get("name") or f"{row.get('provider')}-{position + 1}"


def stored_accounts(stored: Mapping) -> list[tuple[str, dict]]:
    """(label, row) of each account of a file that may not be valid."""
    return [(default_name(row, i), row) for i, row in enumerate(stored.get("accounts") or ())
            if isinstance(row, dict)] if isinstance(stored.get("accounts"), list) else []


def _count_members(name: str, groups: Mapping[str, Group], above: tuple, known: dict) -> int:
    """Models in a group and the groups in it; raises ConfigError for circles and heaps."""
    if name in above:
        raise ConfigError(f"groups.{name}: contains itself: {' > '.join((*above, name))}")
    if name not in known and len(above) < MOST_MEMBERS:
        known[name] = sum(_count_members(item.model.lower(), groups, (*above, name), known)
                          if item.model.lower() in groups else 1 for item in groups[name].items)
    if known.get(name, MOST_MEMBERS + 1) > MOST_MEMBERS:
        raise ConfigError(f"groups.{name}: at most {MOST_MEMBERS} members are possible, with those "
                          "of the groups in it")
    return known[name]


def _config_groups(stored: Mapping) -> dict[str, Group]:
    groups = {}
    for name, row in stored.items():
        where = f"groups.{name}"
        if not isinstance(object_of(row).get("models"), list) or not row["models"]:
            raise ConfigError(f"{where}.models: a list of models is required")
        warn_unknown(row, ("strategy", "models"), where + ".")
        strategy = row.get("strategy", "priority")
        if strategy not in GROUP_STRATEGIES:
            raise ConfigError(f"{where}.strategy: one of {', '.join(GROUP_STRATEGIES)} is required")
        items = []
        for item in row["models"]:
            cells = {"model": item} if isinstance(item, str) else item
            if not isinstance(cells, dict) or not isinstance(cells.get("model"), str):
                raise ConfigError(f"{where}.models: names, or objects with a `model`, are required")
            warn_unknown(cells, GroupItem._fields, where + ".models.")
            known = {k: v for k, v in cells.items() if k in GroupItem._fields}
            weight = known.get("weight", 1)
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or weight < 0 or (
                    not all(isinstance(v, str) for k, v in known.items() if k != "weight")):
                raise ConfigError(f"{where}.models: texts, and a weight of 0 or more, are required")
            items.append(GroupItem(**known))
        groups[name.lower()] = Group(strategy, tuple(items))
    known: dict[str, int] = {}
    for name in groups:
        _count_members(name, groups, (), known)
    return groups


def _config_routes(stored: Mapping) -> dict[str, tuple[str, int]]:
    warn_unknown(stored, ROUTE_ROLES, "routes.")
    routes = {}
    for role, row in stored.items():
        cells = {"to": row} if isinstance(row, str) else row
        over = cells.get("over_tokens", LONG_CONTEXT_TOKENS) if isinstance(cells, dict) else None
        if type(over) is not int or over < 1 or not isinstance(cells.get("to"), str):
            raise ConfigError(f"routes.{role}: a model name is required; for long_context "
                              '{"over_tokens": 60000, "to": "..."} too')
        routes[role] = cells["to"], over
    return routes


def _config_rules(stored: Iterable) -> tuple[Edit, ...]:
    rules = []
    for position, row in enumerate(stored):
        where = f"rules.{position}"
        if not isinstance(row, dict):
            raise ConfigError(f"{where}: an object is required")
        when = row.get("when", {})
        if not isinstance(when, dict) or not all(
                isinstance(v, CONDITIONS.get(k, object)) and (
                    type(v) is not bool or CONDITIONS.get(k) is not int)
                for k, v in when.items()) or not all(
                isinstance(v, str) for v in object_of(when.get("headers")).values()):
            raise ConfigError(f"{where}.when: an object of conditions is required: "
                              + ", ".join(CONDITIONS))
        unknown = [*(row.keys() - set(Edit._fields)), *(when.keys() - CONDITIONS.keys())]
        if unknown:         # a rule that means something else than it says does harm
            raise ConfigError(f"{where}: {unknown[0]} is not known here")
        if row.get("to") and {"upstream", "provider"} & when.keys():
            raise ConfigError(f"{where}: who serves is not known yet where a rule says `to`")
        if not all(isinstance(row.get(n, {}), dict) for n in ("set", "default")) or not all(
                isinstance(row.get(n, ""), str) for n in ("to", "system")) or not isinstance(
                row.get("drop", []), list):
            raise ConfigError(f"{where}: set and default are objects, drop is a list, to and "
                              "system are texts")
        rules.append(Edit(**{**row, "when": when, "drop": tuple(map(str, row.get("drop", ())))}))
    return tuple(rules)


def _config_users(rows: Any) -> tuple[UserKey, ...]:
    """A row for each key of each user; `key_hash` on the user is short for one of `keys`."""
    keys: list[UserKey] = []
    for position, row in enumerate(rows if isinstance(rows, list) else [None]):
        where = f"users.{position}"
        if not isinstance(row, dict) or not isinstance(row.get("name"), str) or not row["name"]:
            raise ConfigError(f"{where}: an object with a `name` is required")
        warn_unknown(row, ("name", "admin", "models", "key_hash", "keys"), where + ".")
        given = row.get("keys", [{"key_hash": row["key_hash"]}] if "key_hash" in row else [])
        for key in given if isinstance(given, list) else [None]:
            cells = {"hint": "", "expires_at": 0, "models": row.get("models", []),
                     "admin": row.get("admin", False), **object_of(key)}
            warn_unknown(cells, ("id", *UserKey._fields), where + ".keys.")
            if not re.fullmatch(r"scrypt:([0-9a-f]{2}){8,}:[0-9a-f]{64}",
                                str(cells.get("key_hash"))):
                raise ConfigError(f"{where}.key_hash: scrypt:<salt hex>:<hash hex> is required")
            if not isinstance(cells["hint"], str) or type(cells["admin"]) is not bool or (
                    type(cells["expires_at"]) not in (int, float)) or not (
                    isinstance(cells["models"], list)
                    and all(isinstance(m, str) for m in cells["models"])):
                raise ConfigError(f"{where}: `hint` is a text, `expires_at` epoch seconds, "
                                  "`models` a list of names, `admin` true or false")
            keys.append(UserKey(row["name"], cells["key_hash"], cells["hint"],
                                cells["expires_at"], tuple(m.lower() for m in cells["models"]),
                                cells["admin"]))
    return tuple(keys)


def environment_accounts(environ: Mapping[str, str]) -> list[dict]:
    """An account for each provider whose key stands in the environment: where there is no file, a
    key is enough."""
    return [{"name": row.id, "provider": row.id, "api_key": "env:" + variable}
            for row in PROVIDERS.values() for variable in row.variables[:1] + tuple(
                v for v in row.variables[1:] if not environ.get(row.variables[0]))
            if environ.get(variable)]


def load_config(path: str, flags: Mapping[str, Any], environ: Mapping[str, str],
                stored: dict | None = None, recovers: bool = False) -> Config:
    """The whole configuration, from `path` or from `stored`; raises ConfigError with a sentence."""
    stored = read_accounts_file(path, recovers) if stored is None else stored
    warn_unknown(stored, ("version", "settings", "providers", "accounts", "aliases", "groups",
                          "users", "routes", "rules"), "")
    if stored.get("version", FILE_VERSION) != FILE_VERSION:
        raise ConfigError(f"version: this file has the form {stored['version']!r} of a newer "
                          f"agproxy, this one knows {FILE_VERSION}; nothing was changed")
    if path and "accounts" not in stored:       # an alias or a setting makes a file too
        stored = {**stored, "accounts": environment_accounts(environ)}
    for name, kind in (("settings", dict), ("providers", dict), ("accounts", list),
                       ("aliases", dict), ("groups", dict), ("routes", dict), ("rules", list)):
        if not isinstance(stored.get(name, kind()), kind):
            raise ConfigError(f"{name}: {'a list' if kind is list else 'an object'} is required")
    providers = dict(PROVIDERS)
    for name, cells in stored.get("providers", {}).items():
        providers[name] = _config_provider(name, cells, providers.get(name))
    accounts, names = [], set()
    for position, row in enumerate(stored.get("accounts", [])):
        account = _config_account(row, f"accounts.{position}", providers)
        account["name"] = default_name(account, position)
        if account["name"] in names:
            raise ConfigError(f"accounts.{position}.name: {account['name']!r} is there twice")
        names.add(account["name"])
        accounts.append(account)
    aliases = {}
    for pattern, target in stored.get("aliases", {}).items():
        targets = [target] if isinstance(target, str) else target
        if not isinstance(targets, list) or not targets or not all(
                isinstance(t, str) for t in targets):
            raise ConfigError(f"aliases.{pattern}: a model name, or a list of them, is required")
        aliases[pattern.lower()] = tuple(targets)
    api_key = environ.get("PROXY_API_KEY", "")
    remember_secret(api_key)
    return Config(path, config_settings(stored.get("settings", {}), flags, environ),
                  providers, tuple(accounts), aliases, _config_groups(stored.get("groups", {})),
                  _config_routes(stored.get("routes", {})), _config_rules(stored.get("rules", [])),
                  api_key, _config_users(stored.get("users", [])))


def _accounts_json(stored: dict, path: str) -> bytes:
    """What is written, which was read back."""
    try:
        data = json.dumps(stored, indent=2, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        if _parse_accounts(data) == stored:
            return data
    except (ValueError, TypeError, RecursionError):
        pass        # as where it reads otherwise
    raise ConfigError(f"{path}: the change cannot be written as JSON")


def _keep_copy(path: str, data: bytes) -> None:
    """The good version beside the file.  Where that fails the file itself is as it should be, and
    the older copy stays."""
    try:
        write_atomic(path + ".bak", data)
    except OSError as err:
        warn_once(f"{path}.bak could not be written: {err.strerror}")


def edit_accounts(path: str, change: Callable[[dict], Any], validates: bool = True) -> Any:
    """What `change` answers, after it changed the stored object and the file was replaced: read
    again under the lock, validated, whole or not at all, the good version kept beside it.  Unknown
    keys and the order of keys stay.  Raises ConfigError or OSError, and the old file stays."""
    path = os.path.realpath(path)
    try:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        with file_lock(path):
            stored = read_accounts_file(path)
            if validates:
                load_config(path, {}, {}, stored)
            result = change(stored)
            if validates:
                load_config(path, {}, {}, stored)
            data = _accounts_json(stored, path)
            write_atomic(path, data)
            _keep_copy(path, data)
    except OSError as err:
        raise OSError(err.errno, f"{path} was not changed: {err.strerror or err}") from err
    return result


def keep_last_good(path: str) -> None:
    """Copies the file, which was found valid, beside itself: a person's edits are worth keeping
    too."""
    path = os.path.realpath(path)
    with contextlib.suppress(OSError, ValueError), file_lock(path):
        raw = _accounts_bytes(path)
        _parse_accounts(raw)
        if not os.path.exists(path + ".bak") or _accounts_bytes(path + ".bak") != raw:
            _keep_copy(path, raw)


def free_name(wanted: str, stored: Mapping) -> str:
    """`wanted`, or with the first number that makes it unique; never an e-mail address."""
    taken = {name for name, _ in stored_accounts(stored)}
    wanted = wanted.partition("@")[0] or "account"
    return next(name for n in range(1, len(taken) + 3)
                for name in (wanted if n == 1 else f"{wanted}-{n}",) if name not in taken)


def store_account(path: str, row: dict, cells: Mapping[str, str] | None = None) -> tuple[str, bool]:
    """(its name, whether it is new).  An account of the same provider with the same e-mail address,
    name or secret gets the new credential and keeps the rest.  `cells` go to its provider.  Raises
    ConfigError where the name is another account's."""
    def change(stored: dict) -> tuple[str, bool]:
        if cells:
            stored.setdefault("providers", {}).setdefault(row["provider"], {}).update(cells)
        rows = stored.setdefault("accounts", [])
        for name, old in stored_accounts(stored):
            is_other = old.get("provider") != row["provider"] or (
                row.get("email") and old.get("email") and old["email"] != row["email"])
            if is_other and row.get("name") == name:
                raise ConfigError(f"the name {name} is another account's; give one with --name")
            if not is_other and (row.get("name") == name or any(
                    row.get(c) and old.get(c) == row[c] for c in ("email", *CREDENTIALS))):
                for credential in CREDENTIALS:
                    old.pop(credential, None)
                old.update({k: v for k, v in row.items() if v and k != "name"})
                return name, False
        new = {**row, "name": row.get("name") or free_name(row.get("email") or row["provider"],
                                                           stored)}
        rows.append({k: v for k, v in new.items() if v not in ("", None)})
        return new["name"], True
    return edit_accounts(path, change)


def save_rotated_token(path: str, account: str, old: Iterable[str], new: str) -> None:
    """Writes a rotated refresh token over one of the old ones, on the file as it is now."""
    def change(stored: dict) -> None:
        row = next((r for _, r in stored_accounts(stored)
                    if r.get("refresh_token") in (new, *old)), None)
        if row is None:
            raise ConfigError(f"{account} is not in {path} with its old token")
        row["refresh_token"] = new
    edit_accounts(path, change, validates=False)    # whatever else a person is editing there


# ── 5. Records ────────────────────────────────────────────────────────────
# What happened: one line a request and counters; what was learned: state.db.
# Log and database have a thread each.  Nobody waits here; secrets do not get
# past `redact`, and none is in the database.


@dataclass
class Record:
    """One request, filled in as it goes, written when it ends.  Times are monotonic seconds."""
    id: str
    client: str = "-"
    asked: str = "-"
    used: str = "-"
    account: str = "-"
    status: int = 0
    started_at: float = 0.0
    first_byte_at: float = 0.0
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    failures: list[str] = field(default_factory=list)   # "account: kind" of each failed try
    attempts: int = 0
    note: str = ""
    session: str = ""           # hash of the conversation, as its requests are grouped by
    agent: str = ""
    parent: str = ""            # of the agent
    mended: Mapping[str, int] = field(default_factory=dict)     # repairs of the conversation
    refused: tuple = ()         # repairs that refusals asked for
    choices: list = field(default_factory=list)         # (at, reason, verdicts) of each selection

    def tell(self, note: str) -> None:
        """One more thing for the log's line; what stands there already stays."""
        note = redact(note, 200)
        if note not in self.note:
            self.note = f"{self.note}; {note}" if self.note else note


def request_line(record: Record, now: float) -> str:
    """client, model asked -> used, account, status, tries, times, tokens: one line."""
    first_ms = (record.first_byte_at - record.started_at) * 1000 if record.first_byte_at else 0
    total_ms = (now - record.started_at) * 1000
    tries = f"{record.attempts} {'try' if record.attempts == 1 else 'tries'}"
    if record.failures:
        tries += f" ({'; '.join(record.failures)})"
    return (f"{record.client}  {record.asked} -> {record.used}  {record.account}  {record.status}"
            f"  {tries}  first {first_ms:.0f} ms  total {total_ms:.0f} ms  in {record.input_tokens}"
            f" cached {record.cached_tokens} out {record.output_tokens}"
            + (f"  {record.note}" if record.note else ""))


class Log:
    """Readable lines on one text stream.  Formatting and writing happen in the log's own thread;
    `line` only enqueues.  When nobody drains the queue, lines are dropped and counted."""

    def __init__(self, out: Any):
        self.out, self.dropped = out, 0
        self._lock = threading.Lock()       # guards dropped
        self._lines: collections.deque = collections.deque()
        self._wake, self._is_closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def line(self, text: str, *values: Any) -> None:
        if len(self._lines) >= MOST_LINES:
            self._drop(1)
            return
        self._lines.append((time.time(), text, values))
        if not self._wake.is_set():
            self._wake.set()

    def _drop(self, count: int) -> None:
        with self._lock:
            self.dropped += count

    def request(self, record: Record, now: float) -> None:
        self.line("", record, now)

    def close(self) -> None:
        """Writes what is queued, then ends."""
        self._is_closing.set()
        self._wake.set()
        self._thread.join(5)

    def _run(self) -> None:
        is_last = False
        while not is_last:
            self._wake.wait()
            self._wake.clear()          # before the look: what comes now wakes it again
            is_last, out = self._is_closing.is_set(), []
            while self._lines:
                at, text, values = self._lines.popleft()
                stamp = time.strftime("%H:%M:%S", time.localtime(at))
                line = text % values if text else request_line(*values)
                out.append(f"{stamp} {redact(line, 1000)}\n")
            try:
                self.out.write("".join(out))
                self.out.flush()
            except (OSError, ValueError):
                self._drop(len(out))        # the terminal is gone; serving goes on
            # one wake-up for the lines of a moment: 25 us a request against 97 under load
            self._is_closing.wait(LOG_EVERY_S)


# state.db

MIGRATIONS = (      # by user_version: each script runs once, in its order; never edit an old one
    """CREATE TABLE rests(key TEXT PRIMARY KEY, kind TEXT, until REAL, is_stated INTEGER,
           failures INTEGER, failed_at REAL, message TEXT, changed_at REAL);
       CREATE TABLE facts(account TEXT, pool TEXT, project TEXT, tier TEXT, absent TEXT,
           models TEXT, at REAL, PRIMARY KEY(account, pool));
       CREATE TABLE quotas(account TEXT, pool TEXT, scope TEXT, window TEXT, fraction REAL,
           reset_at REAL, at REAL, PRIMARY KEY(account, pool, scope, window, at));
       CREATE TABLE used(account TEXT PRIMARY KEY, at REAL, health REAL, tokens REAL);
       CREATE TABLE requests(id TEXT PRIMARY KEY, at REAL, json TEXT);
       CREATE INDEX requests_at ON requests(at);""",
    """CREATE TABLE signatures(key TEXT PRIMARY KEY, family TEXT, tag TEXT, raw TEXT, at REAL);
       CREATE INDEX signatures_at ON signatures(at);
       CREATE TABLE learned(key TEXT PRIMARY KEY, json TEXT, at REAL);""",
    """CREATE TABLE replies(id TEXT PRIMARY KEY, json BLOB, at REAL);
       CREATE INDEX replies_at ON replies(at);""",
)


# an OperationalError is about a disk or a lock, but for these: the tables are other ones
_OTHER_TABLES = re.compile("unsupported|already exists|no such|has no column|values were supplied")


def _is_damage(err: Exception) -> bool:
    """Whether an error of SQLite says that the file itself is not as it should be."""
    import sqlite3
    return type(err) is sqlite3.DatabaseError or (
        isinstance(err, sqlite3.OperationalError) and bool(_OTHER_TABLES.search(str(err))))


def _state_form(db: Any) -> int:
    """How many of MIGRATIONS a database has."""
    return db.execute("PRAGMA user_version").fetchone()[0]


def _columns(db: Any) -> list[tuple]:
    """(table, column) of all tables, in their order."""
    return db.execute("SELECT m.name, c.name FROM sqlite_master AS m JOIN pragma_table_info(m.name)"
                      " AS c WHERE m.type = 'table' ORDER BY m.name, c.cid").fetchall()


@functools.lru_cache(maxsize=None)
def _insertion(table: str, count: int) -> str:
    """The SQL that puts a row of `count` columns.  Of `rests` the newer row holds."""
    marks = ", ".join("?" * count)
    if table == "rests":
        return (f"INSERT OR REPLACE INTO rests SELECT {marks} WHERE NOT EXISTS "
                "(SELECT 1 FROM rests WHERE key = ? AND changed_at > ?)")
    return f"INSERT OR REPLACE INTO {table} VALUES({marks})"


class State:
    """What the program learns, in one SQLite file shared by all processes of this owner.  `put` and
    `delete` only enqueue; one thread writes, urgent rows at once, others four times a second.
    Without write access, or with a newer version's file, it lives in memory, which is said once."""

    def __init__(self, path: str, tell: Callable[[str], None], max_bytes: int = 64 << 20):
        self.path, self.tell, self.max_bytes = path, tell, max_bytes
        self.on_foreign_change: Callable[[], None] = lambda: None
        self.on_lost: Callable[[], None] = lambda: None     # its file is another one now: put again
        self.dropped = 0
        self.is_crowded = False         # much was written: time to tidy
        self.is_shared = False          # other processes are known that learn and look here
        self._reading = threading.Lock()        # guards the reader and what it has seen
        self._reader, self._read_version, self._read_to = None, -1, 0
        self._jobs: collections.deque = collections.deque()     # (SQL, Event or None, values)
        self._wake = threading.Event()
        self._lock = threading.Lock()       # guards the connection
        self._dropping = threading.Lock()       # guards dropped
        self._told = ""                 # the trouble that was told last
        self._retry_at = 0.0            # when what could not be written is tried again
        self._wanted, self._again_at = path, 0.0        # a file that could not be had, and when
        self._db = self._prepare()                      # it is tried again
        # from here on a foreign commit is noticed, and another file in its place
        self._seen, self._opened = self._version(), self._file_id()
        self._thread = threading.Thread(target=self._run, name="state", daemon=True)
        self._thread.start()

    def put(self, table: str, *row: Any, urgent: bool = False) -> None:
        """Inserts or replaces one row, in the order of the table's columns.  A value that is a
        function is called in the writing thread."""
        sql = _insertion(table, len(row))
        self._enqueue(sql, row + (row[0], row[-1]) if table == "rests" else row, urgent)

    def delete(self, table: str, account: str) -> None:
        self._enqueue(f"DELETE FROM {table} WHERE account = ?", (account,), True)

    def rows(self, table: str, where: str = "1", *values: Any) -> list[tuple]:
        """What is on disk now; not for the request path.  [] when it cannot be read."""
        import sqlite3
        query = f"SELECT * FROM {table} WHERE {where}"
        try:
            if not self.path:
                with self._lock:
                    return self._db.execute(query, values).fetchall()
            with contextlib.closing(sqlite3.connect(self.path, timeout=5)) as db:
                return db.execute(query, values).fetchall()
        except sqlite3.Error as err:
            if self.path and _is_damage(err):
                self._opened = None         # its thread sees to it
            else:
                self._say(f"{self._wanted} cannot be read ({err})")
            return []

    def news(self, table: str, most: int) -> list[tuple]:
        """The rows that any process wrote since the last call, the newest `most` in their order.
        For one asker, in a request's path: while nobody has committed it is [] at once (4 us, by a
        connection that stays)."""
        import sqlite3
        if not self.path:
            return []
        with self._reading:
            try:
                if self._reader is None:
                    self._reader = sqlite3.connect(self.path, timeout=5, isolation_level=None,
                                                   check_same_thread=False)
                ask = self._reader.execute
                version = ask("PRAGMA data_version").fetchone()[0]
                if version == self._read_version:
                    return []
                # numbers begin anew when a table was emptied
                top = ask(f"SELECT max(rowid) FROM {table}").fetchone()[0] or 0
                rows = ask(f"SELECT rowid, * FROM {table} WHERE rowid > ? ORDER BY rowid DESC "
                           "LIMIT ?", (self._read_to if self._read_to <= top else 0, most)
                           ).fetchall()
            except sqlite3.Error:
                return []       # `rows` would say why; the next miss asks again
            self._read_version, self._read_to = version, rows[0][0] if rows else top
            return [row[1:] for row in reversed(rows)]

    def _forget_reader(self) -> None:
        with self._reading:
            if self._reader is not None:
                self._reader.close()
            self._reader, self._read_version, self._read_to = None, -1, 0

    def flush(self) -> None:
        """Returns when everything enqueued so far was written, or could not be."""
        done = threading.Event()
        self._enqueue(done, (), True)
        done.wait(10)

    def close(self) -> None:
        self._enqueue(None, (), True)
        self._thread.join(10)
        self._forget_reader()

    def _enqueue(self, sql: Any, values: tuple, urgent: bool) -> None:
        if urgent or len(self._jobs) < 20_000:
            self._jobs.append((sql, values))
        else:
            self._drop()
        if urgent:
            self._wake.set()

    def _drop(self) -> None:
        with self._dropping:
            self.dropped += 1

    def _say(self, trouble: str) -> None:
        """Once, until it is over or another one comes."""
        if trouble != self._told:
            self._told = trouble
            self.tell(trouble)

    def _prepare(self) -> Any:
        """A connection to the file, sound and migrated; else to a database in memory."""
        import sqlite3
        if self.path:
            try:
                # two processes may find the same damage; many that start at once check in turn
                return self._open_file(self.path, 30)
            except (OSError, sqlite3.Error) as err:
                self._say(f"{self.path} is not used ({cause(err)}); limits are kept in memory only")
            path, self.path, self._again_at = self.path, "", time.monotonic() + STATE_AGAIN_S
            return self._read_only(path)
        return self._open(":memory:")

    def _read_only(self, path: str) -> Any:
        """A database in memory that knows the limits of a file which cannot be written."""
        import sqlite3
        db = self._open(":memory:")
        for how in ("immutable=1", "mode=ro"):      # the second sees the newest, where it can
            with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(
                    f"file:{urllib.parse.quote(path)}?{how}", timeout=0, uri=True)) as source:
                for table in ("rests", "facts"):
                    for row in source.execute(f"SELECT * FROM {table}").fetchall():
                        marks = ", ".join("?" * len(row))
                        db.execute(f"INSERT OR REPLACE INTO {table} VALUES({marks})", row)
        return db

    def _open_file(self, path: str, wait_s: float) -> Any:
        """The file; a damaged one is begun anew.  What others may read is closed to them."""
        import sqlite3
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        with file_lock(path, wait_s):
            # not opened where it is there: closing it would free the locks that SQLite has on it
            with contextlib.suppress(FileExistsError):
                os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
            for ending in ("", "-wal", "-shm"):
                with contextlib.suppress(FileNotFoundError):
                    close_to_others(path + ending)
            try:
                return self._open(path)
            except sqlite3.Error as err:
                if not _is_damage(err):
                    raise
                aside = set_aside(path)
                for ending in ("-wal", "-shm"):
                    with contextlib.suppress(OSError):      # there is none after a clean end
                        os.replace(path + ending, aside + ending)
                os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
                self.tell(f"{path} was damaged ({err}); it is {aside} now, a new one is begun")
                return self._open(path)

    def _open(self, target: str) -> Any:
        """Opens and brings to the present form; raises what stands in the way."""
        import sqlite3
        db = sqlite3.connect(target, timeout=5, isolation_level=None, check_same_thread=False)
        try:
            if _state_form(db) > len(MIGRATIONS):
                raise OSError("it belongs to a newer version of agproxy")
            if db.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
                raise sqlite3.DatabaseError("its integrity check failed")
            for pragma in ("auto_vacuum=INCREMENTAL", "journal_mode=WAL", "synchronous=NORMAL"):
                db.execute("PRAGMA " + pragma)
            with db:
                db.execute("BEGIN IMMEDIATE")
                for statement in ";".join(MIGRATIONS[_state_form(db):]).split(";"):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version={len(MIGRATIONS)}")
            with contextlib.closing(sqlite3.connect(":memory:")) as model:
                model.executescript("".join(MIGRATIONS))
                wanted = _columns(model)
            tables = {table for table, _ in wanted}
            if [column for column in _columns(db) if column[0] in tables] != wanted:
                raise sqlite3.DatabaseError("its tables are other ones")
        except BaseException:
            db.close()
            raise
        return db

    def _version(self) -> int:
        """Changes when another process has committed."""
        return self._db.execute("PRAGMA data_version").fetchone()[0]

    def _run(self) -> None:
        pending: list = []
        look_at = tidy_at = 0.0
        while True:
            self._wake.wait(0.25)
            self._wake.clear()
            while self._jobs:
                pending.append(self._jobs.popleft())
            now, is_end = time.monotonic(), any(sql is None for sql, _ in pending)
            try:
                if pending and (now >= self._retry_at or is_end):
                    self._retry_at = now + 5        # in case it cannot be written
                    self._write(pending)
                    pending, self._retry_at = [], 0.0
                    if self._told and self.path:
                        self.tell(f"{self.path} is in use again")
                        self._told = ""
                self._answer(pending)
                if is_end:
                    with self._lock:
                        self._db.close()
                    return
                if now >= look_at:
                    look_at = now + 1
                    self._look()
                if now >= tidy_at or self.is_crowded:
                    tidy_at, self.is_crowded = now + 3600, False
                    with self._lock:
                        self._tidy()
            except Exception as err:    # a thread's top: the disk may be back in five seconds
                self._failed(err)
                if is_end:
                    self._db.close()
                    return
                pending = [job for job in pending if isinstance(job[0], str)][-5000:]

    def _failed(self, err: Exception) -> None:
        import sqlite3
        if self.path and _is_damage(err):
            self._opened = None         # looked at, set aside and begun anew
        elif isinstance(err, (OSError, sqlite3.Error)):
            self._say(f"{self._wanted} cannot be written ({cause(err)}); what is learned stays in "
                      "memory until it can")
        else:
            self._say(f"state.db: {short_trace(err)}")

    def _look(self) -> None:
        """Notices what other processes wrote, and a file that was damaged, taken away, or brought
        to a newer version's form; tries one again that could not be had."""
        if self.path and self._file_id() != self._opened:
            if self._opened is not None:
                self.tell(f"{self.path} was taken away or replaced; it is written anew from memory")
            self._go_over(self._prepare)
        elif self._wanted != self.path and time.monotonic() > self._again_at:
            self._again_at = time.monotonic() + STATE_AGAIN_S
            self._try_again()
        with self._lock:
            before, self._seen = self._seen, self._version()
            form = _state_form(self._db) if self._seen != before and self.path else 0
        if form > len(MIGRATIONS):
            self._go_over(self._prepare)
        elif self._seen != before:
            self.is_shared = True
            self.on_foreign_change()

    def _try_again(self) -> None:
        import sqlite3
        with contextlib.suppress(OSError, sqlite3.Error):       # which was said at the beginning
            found = self._open_file(self._wanted, 0)
            self.path = self._wanted
            self._go_over(lambda: found)

    def _go_over(self, prepare: Callable[[], Any]) -> None:
        """Another connection in place of this one, and everything that is known put there."""
        import sqlite3
        kept: list = []
        with self._lock:
            with contextlib.suppress(sqlite3.Error):        # it may be damaged
                for table in {table for table, _ in _columns(self._db)} - {"rests"}:
                    kept += [(table, row) for row in self._db.execute(f"SELECT * FROM {table}")]
            self._db.close()        # before: it may delete files of that name
            self._forget_reader()
            self._db = prepare()
            counts = collections.Counter(table for table, _ in _columns(self._db))
            self._seen, self._opened = self._version(), self._file_id()
            self._retry_at = 0.0
        self._jobs.extendleft((_insertion(table, len(row)), row) for table, row in reversed(kept)
                              if len(row) == counts[table])     # not of a newer version
        self.on_foreign_change()        # what it knows already
        self.on_lost()

    def _file_id(self) -> int:
        try:
            return os.stat(self.path).st_ino if self.path else 0
        except OSError:
            return -1

    def _execute(self, sql: str, rows: list) -> None:
        """All rows; those that no column takes are left out, for the sake of the others."""
        import sqlite3
        try:
            self._db.executemany(sql, rows)
        except (sqlite3.InterfaceError, sqlite3.ProgrammingError, OverflowError, ValueError):
            if len(rows) == 1:
                self._drop()
            for row in rows if len(rows) > 1 else ():
                self._execute(sql, [row])

    def _execute_all(self, rows: dict[str, list]) -> None:
        for sql in list(rows):
            self._execute(sql, rows.pop(sql))

    def _write(self, jobs: list) -> None:
        """Writes jobs in one transaction; flushes are answered also when that fails."""
        try:
            with self._lock, self._db:      # commits, or rolls back
                self._db.execute("BEGIN IMMEDIATE")
                rows: dict[str, list] = {}      # of one statement together; tables in any order
                for sql, values in jobs:
                    if isinstance(sql, str) and not sql.startswith("INSERT"):
                        self._execute_all(rows)
                    if isinstance(sql, str):
                        rows.setdefault(sql, []).append([v() if callable(v) else v for v in values])
                self._execute_all(rows)
        finally:
            self._answer(jobs)

    @staticmethod
    def _answer(jobs: list) -> None:
        """Lets those go on who wait for a flush."""
        for sql, _ in jobs:
            if isinstance(sql, threading.Event):
                sql.set()

    def _tidy(self) -> None:
        """Forgets what is old, and the oldest requests when the file is above its ceiling."""
        now, db = time.time(), self._db
        db.execute("DELETE FROM requests WHERE at < ?", (now - KEEP_REQUESTS_S,))
        db.execute("DELETE FROM quotas WHERE at < ?", (now - MAX_STATED_DELAY_S,))
        db.execute("DELETE FROM signatures WHERE at < ? OR key NOT IN (SELECT key FROM signatures "
                   "ORDER BY at DESC LIMIT ?)", (now - SIGNATURES_LAST_S, MOST_SIGNATURES))
        left = MOST_REPLY_BYTES
        db.execute("DELETE FROM replies WHERE at < ?", (now - REPLIES_LAST_S,))
        for reply_id, size in db.execute("SELECT id, length(json) FROM replies ORDER BY at DESC"
                                         ).fetchall():
            left -= size
            if left < 0:
                db.execute("DELETE FROM replies WHERE id = ?", (reply_id,))
        # one that ended must stay until every process has seen it
        db.execute("DELETE FROM rests WHERE until < ? AND changed_at < ?", (now, now - 86400))
        while True:
            pages = db.execute("PRAGMA page_count").fetchone()[0]
            pages -= db.execute("PRAGMA freelist_count").fetchone()[0]
            size = pages * db.execute("PRAGMA page_size").fetchone()[0] - max(
                0, MOST_REPLY_BYTES - left)
            if size <= self.max_bytes or not db.execute(
                    "DELETE FROM requests WHERE id IN (SELECT id FROM requests ORDER BY at "
                    "LIMIT 1 + (SELECT count(*) / 4 FROM requests))").rowcount:
                break
        db.execute("PRAGMA incremental_vacuum")


class Calibration:
    """How far our own count of tokens is off for each model: the median of true by estimated over
    its last 50 looks, taken over at most once an hour, so that one `/context` is consistent.  Looks
    are taken now and then, in the thread of `state`.  The lock guards everything."""

    def __init__(self, clock: Clock, state: State | None = None):
        self.clock, self.state = clock, state
        self._lock = threading.Lock()
        self._ratios: dict[str, collections.deque] = {}
        self._factors: dict[str, tuple[float, float]] = {}      # model -> (factor, since)
        self._looked_at: dict[str, float] = {}
        for key, text, at in state.rows("learned", "key LIKE 'tokens %'") if state else ():
            with contextlib.suppress(ValueError, TypeError, LookupError):   # not of our making
                model, ratios = key[7:], collections.deque(json_decode(text.encode()), 50)
                self._ratios[model], self._factors[model] = ratios, (self._median(ratios), at)

    def factor(self, model: str) -> float:
        if model in self._factors:
            return self._factors[model][0]
        return next((k for pattern, k in TOKEN_FACTORS if fnmatch.fnmatchcase(model, pattern)), 1.0)

    def is_due(self, model: str) -> bool:
        """Whether another look would be taken now."""
        with self._lock:
            return self.clock.now() - self._looked_at.get(model, 0.0) >= CALIBRATE_EVERY_S

    def note(self, model: str, estimate: Callable[[], int], true: int) -> None:
        """One answer's true input; `estimate` counts the same request, later and elsewhere."""
        now = self.clock.now()
        with self._lock:
            if true < 200 or now - self._looked_at.get(model, 0.0) < CALIBRATE_EVERY_S:
                return          # overheads weigh too much in small ones
            self._looked_at[model] = now
        if self.state is None:
            self._learn(model, estimate(), true, now)
        else:
            self.state.put("learned", "tokens " + model,
                           lambda: self._learn(model, estimate(), true, now), now)

    def _learn(self, model: str, estimated: int, true: int, now: float) -> str:
        """The ratios as JSON, with this one."""
        with self._lock:
            ratios = self._ratios.setdefault(model, collections.deque(maxlen=50))
            ratios.append(round(true / max(1, estimated), 4))
            if len(ratios) > 2 and now - self._factors.get(model, (1.0, 0.0))[1] > 3600:
                self._factors[model] = self._median(ratios), now
            return json_encode(list(ratios))

    @staticmethod
    def _median(ratios: Iterable[float]) -> float:
        ordered = sorted(ratios)
        return max(0.7, min(1.6, ordered[len(ordered) // 2]))


class Meters:
    """Counters of this process.  Guarded by one lock: requests, errors, tokens."""

    def __init__(self):
        self._lock = threading.Lock()
        self._counts: collections.Counter = collections.Counter()

    def add(self, **amounts: int) -> None:
        with self._lock:
            for name, amount in amounts.items():
                self._counts[name] += amount

    def snapshot(self) -> dict[str, int]:
        with self._lock:
            return dict(self._counts)


class Memory:
    """Thinking signatures by client tool id and by content: (family, tag, raw) each.  Bounded by
    count and letters; what was used longest ago goes first, and after a day unused.  `state` keeps
    them over a restart, and has what other processes learn.  The lock guards items and size."""

    def __init__(self, clock: Clock, state: State | None = None):
        self.clock, self.state = clock, state
        self._lock = threading.Lock()
        self._items: collections.OrderedDict = collections.OrderedDict()    # -> (value, at)
        self._letters = 0
        rows = state.rows("signatures", "at > ? ORDER BY at DESC LIMIT ?",
                          clock.now() - SIGNATURES_LAST_S, MOST_SIGNATURES) if state else ()
        for key, family, tag, raw, at in reversed(rows):
            self._keep(key, (family, tag, raw), at)

    def get(self, key: str) -> Any:
        now = self.clock.now()
        with self._lock:
            if key not in self._items and self.state is not None and self.state.is_shared:
                self._take_over()
            value, at = self._items.get(key) or (None, 0.0)
            if value is None or now - at > SIGNATURES_LAST_S:
                return None
            self._items.move_to_end(key)
        if now - at > 3600:         # in use: its day begins again
            self[key] = value
        return value

    def _take_over(self) -> None:
        """What other processes remembered since; no message of theirs says so, a miss does."""
        for key, family, tag, raw, at in self.state.news("signatures", MOST_SIGNATURES):
            if self._items.get(key, (None, 0.0))[1] < at:
                self._keep(key, (family, tag, raw), at)

    def __setitem__(self, key: str, value: tuple) -> None:
        now = self.clock.now()
        with self._lock:
            self._keep(key, value, now)
        if self.state is not None:      # another worker may get the conversation's next request
            self.state.put("signatures", key, *value, now, urgent=self.state.is_shared)

    def _keep(self, key: str, value: tuple, at: float) -> None:
        old = self._items.pop(key, None)
        self._letters += len(value[2]) - (len(old[0][2]) if old else 0)
        self._items[key] = value, at
        while len(self._items) > MOST_SIGNATURES or self._letters > MOST_SIGNATURE_LETTERS:
            self._letters -= len(self._items.popitem(last=False)[1][0][2])


class Replies:
    """Answers that clients go on from by their id: {"previous": id, "input": items, "output":
    items, "relayed": bool}.  A day and MOST_REPLY_BYTES of them are in state.db; the newest are
    here too.  The lock guards what follows it."""

    def __init__(self, clock: Clock, state: State):
        self.clock, self.state = clock, state
        self._lock = threading.Lock()
        self._newest: collections.OrderedDict = collections.OrderedDict()   # id -> (row, bytes)
        self._bytes = self._since_tidy = 0

    def keep(self, reply_id: str, row: dict, size: int) -> None:
        """`size` is about that of its JSON."""
        row = {**row, "size": size}
        with self._lock:
            self._bytes += size - self._newest.pop(reply_id, (None, 0))[1]
            self._newest[reply_id] = row, size
            self._since_tidy += size
            while len(self._newest) > 256 or self._bytes > MOST_REPLY_BYTES // 8:
                self._bytes -= self._newest.popitem(last=False)[1][1]
            if self._since_tidy > MOST_REPLY_BYTES // 4:
                self._since_tidy, self.state.is_crowded = 0, True
        self.state.put("replies", reply_id, lambda: zlib.compress(json_encode(row).encode()),
                       self.clock.now(), urgent=self.state.is_shared)

    def get(self, reply_id: str) -> dict | None:
        """The row, whose day begins again when half of it is over."""
        with self._lock:
            row, _ = self._newest.get(reply_id) or (None, 0)
        if row is not None:
            return row
        self.state.flush()      # one that is no longer among the newest may be on its way
        now = self.clock.now()
        # another process may be about to write one whose end its client has already
        for pause_s in (0.0, *[0.05] * 20 * self.state.is_shared):
            time.sleep(pause_s)
            found = self.state.rows("replies", "id = ? AND at > ?", reply_id, now - REPLIES_LAST_S)
            if found:
                break
        else:
            return None
        if now - found[0][2] > REPLIES_LAST_S / 2:
            self.state.put("replies", reply_id, found[0][1], now)
        return json.loads(zlib.decompress(found[0][1]))


# ── 6. Wire framing ───────────────────────────────────────────────────────
# HTTP heads, bodies and server-sent events as machines that are fed bytes and
# answer; they own no socket and know no dialect.  Anything doubtful is refused.

_HEADER_LINES = re.compile(rb"(?:\r\n[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\r\n\0]*)*")
_TARGET = re.compile(rb"(?:http://[^/\s?#]+(?=[/?]|\Z))?(/[!-~]*)?\Z")
_CHUNK_SIZE = re.compile(rb"(?=[0-9a-fA-F]*[1-9a-fA-F])([0-9a-fA-F]{1,8})\r\n")
_ONCE = frozenset("content-length transfer-encoding content-type authorization x-api-key origin "
                  "content-encoding expect host".split())


class Head(NamedTuple):
    """A message head: `first` is the start line, names are lower-case, repeated values joined."""
    first: bytes
    headers: dict[str, str]


def parse_head(raw: bytes, is_request: bool) -> Head:
    """Head of the bytes before the empty line.  Requests are read strictly: RFC 9112 with every
    tolerance that allows smuggling refused.  Raises ProxyError invalid_request, head_too_large."""
    first, *lines = raw.split(b"\r\n")
    if len(lines) > MAX_HEADERS:
        raise ProxyError("head_too_large", f"more than {MAX_HEADERS} header lines")
    if is_request:
        if len(raw) > MAX_LINE_BYTES and max(map(len, lines), default=0) > MAX_LINE_BYTES:
            raise ProxyError("head_too_large",
                             f"a header line of more than {MAX_LINE_BYTES} bytes")
        if not _HEADER_LINES.fullmatch(raw, len(first)):
            raise invalid("", "malformed header line")
    headers: dict[str, str] = {}
    for line in raw.decode("latin-1").split("\r\n")[1:]:
        name, _, value = line.partition(":")
        key, text = name.lower(), value.strip(" \t")
        if key in headers:
            if is_request and key in _ONCE:
                raise invalid("", f"header {key} is given twice")
            headers[key] += ", " + text
        else:
            headers[key] = text
    return Head(first, headers)


class RequestLine(NamedTuple):
    method: str
    path: str               # raw, as sent: never decoded or normalised
    query: str
    is_http_1_0: bool


def parse_request_line(first: bytes) -> RequestLine:
    if len(first) > MAX_LINE_BYTES:
        raise ProxyError("line_too_long", f"a request line of more than {MAX_LINE_BYTES} bytes")
    words = first.split(b" ")
    if len(words) != 3 or words[2] not in (b"HTTP/1.1", b"HTTP/1.0") or not words[0].isalpha():
        raise invalid("", "malformed request line")
    method, target, version = words
    if target == b"*" and method == b"OPTIONS":
        target = b"/"
    match = _TARGET.match(target)
    if not match:
        raise invalid("", "malformed request target")
    path, _, query = (match[1] or b"/").decode("ascii").partition("?")
    return RequestLine(method.decode("ascii"), path, query, version == b"HTTP/1.0")


class BodyReader:
    """Takes a message body out of raw bytes: by length, chunked, or until the connection closes,
    gzip or deflate undone.  `done` is set when the framing itself says so; what follows is `rest`.
    Raises ValueError on any doubt.  `limit` holds for the decoded bytes."""

    def __init__(self, framing: str | int, limit: int, encoding: str = "",
                 is_request: bool = False):
        self.framing = framing          # a length in bytes, "chunked" or "close"
        self.limit, self.is_request = limit, is_request
        self.done, self.rest, self.total = framing == 0, b"", 0
        self._held = b""                # an incomplete chunk head
        self._left = framing if isinstance(framing, int) else 0     # bytes of this chunk or body
        self._state = "size"            # of a chunked body: size, data, end, trailer
        self._unzip = None
        if encoding in ("gzip", "x-gzip", "deflate"):
            self._unzip = zlib.decompressobj(47 if encoding != "deflate" else 15)

    def feed(self, data: bytes) -> bytes:
        """The decoded body bytes in `data`; may be empty."""
        if isinstance(self.framing, int):
            body, self.rest = data[:self._left], data[self._left:]
            self._left -= len(body)
            self.done = self._left == 0
        elif self.framing == "close":
            body = data
        else:
            body = self._feed_chunked(data)
        if self._unzip is not None:
            try:
                body = self._unzip.decompress(body, self.limit + 1)
            except zlib.error as err:
                raise ValueError(f"damaged compression: {err}") from err
        self.total += len(body)
        if self.total > self.limit:
            raise OverflowError(f"body of more than {self.limit} bytes")
        if self._unzip is not None and self.done and not self._unzip.eof:
            raise ValueError("compressed body is cut")
        return body

    def end(self) -> bool:
        """The connection closed: whether the body is complete."""
        if self.framing == "close" and (self._unzip is None or self._unzip.eof):
            self.done = True
        return self.done

    def _feed_chunked(self, data: bytes) -> bytes:
        if self._held:
            data, self._held = self._held + data, b""
        parts, i, n, whole_size = [], 0, len(data), _CHUNK_SIZE.match
        while i < n and not self.done:
            if self._state == "data":
                piece = data[i:i + self._left]
                parts.append(piece)
                i += len(piece)
                self._left -= len(piece)
                if not self._left:
                    self._state = "end"
                continue
            match = whole_size(data, i) if self._state == "size" else None
            if match:       # 0.5 us a chunk against 2.2: one match for each whole one
                size, i = int(match[1], 16), match.end()
                if i + size + 2 <= n and data[i + size:i + size + 2] == b"\r\n":
                    parts.append(data[i:i + size])
                    i += size + 2
                    continue
                self._left, self._state = size, "data"
                continue
            line_end = data.find(b"\r\n", i)
            if line_end < 0:
                if n - i > MAX_LINE_BYTES:
                    raise ValueError("chunk head too long")
                self._held, i = data[i:], n
                break
            line, i = data[i:line_end], line_end + 2
            self._chunk_line(line)
        if self.done:
            self.rest = data[i:]
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _chunk_line(self, line: bytes) -> None:
        """One line between chunks: the end of a chunk, a size, or a trailer."""
        if b"\n" in line or b"\r" in line:
            raise ValueError("bare line break between chunks")
        if self._state == "end":
            if line:
                raise ValueError("chunk longer than its size")
            self._state = "size"
        elif self._state == "trailer":
            if line and self.is_request:
                raise ValueError("trailers are not accepted")
            self.done = not line
        else:
            size = line.partition(b";")[0].rstrip(b" \t")
            if not 1 <= len(size) <= 8 or size.strip(b"0123456789abcdefABCDEF"):
                raise ValueError("malformed chunk size")
            self._left = int(size, 16)
            self._state = "data" if self._left else "trailer"


def body_framing(headers: Mapping[str, str], is_request: bool, no_body: bool = False) -> str | int:
    """A length, "chunked" or "close".  Raises ValueError where two readers could disagree."""
    coding, length = headers.get("transfer-encoding"), headers.get("content-length")
    if no_body:
        return 0
    if coding is not None:
        if coding.lower() != "chunked" or (is_request and length is not None):
            raise ValueError("unusable Transfer-Encoding")
        return "chunked"
    if length is not None:
        if not (length.isascii() and length.isdigit() and len(length) <= 15):
            raise ValueError("malformed Content-Length")
        return int(length)
    return 0 if is_request else "close"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


LAST_CHUNK = b"0\r\n\r\n"


def _events_of(text: str) -> list[str]:
    events = []
    for event in text.split("\n\n"):
        if event.startswith("data: ") and "\n" not in event:
            events.append(event[6:])
            continue
        lines = []
        for line in event.split("\n"):
            if line.startswith("data:"):
                lines.append(line[6:] if line.startswith("data: ") else line[5:])
            elif line.startswith(("{", "[")):
                lines.append(line)
        if lines:
            events.append("\n".join(lines))
    return events


def whole_events(text: str) -> list[str]:
    """The events of a text as they stand, for those who relay them."""
    return [event for event in text.split("\n\n") if event and event != "\n"]


class SseSplitter:
    """Bytes of a `text/event-stream` in, the data texts of its complete events out.  Event names
    are not needed: every dialect repeats them inside the data.  Takes LF, CRLF and CR, comments,
    several data lines, and bare JSON lines, cut anywhere.  Bad UTF-8 or size: ValueError."""

    def __init__(self, events: Callable[[str], list[str]] = _events_of):
        self._events = events
        self._parts: list[bytes] = []       # of an unfinished event, with LF as line breaks
        self._size, self._half = 0, b""     # a CR at the end may be half of a CRLF

    def feed(self, data: bytes) -> list[str]:
        events = self._single_lines(data)
        return self._any_lines(data) if events is None else events

    def _single_lines(self, data: bytes) -> list[str] | None:
        """The events where each is one line and all breaks are alike, as nearly always: 0.4 us an
        event against 1.2.  None where there is any doubt; nothing is changed then."""
        if self._half or len(self._parts) > 1 or self._events is not _events_of:
            return None
        has_cr = b"\r" in data
        data = self._parts[0] + data if self._parts else data
        whole, found, rest = data.rpartition(b"\r\n\r\n" if has_cr else b"\n\n")
        if not found or b"\n" in rest or b"\r" in rest:
            return None
        events = whole.split(b"\r\n\r\ndata: " if has_cr else b"\n\ndata: ")
        lines = b"".join(events)
        if whole[:6] != b"data: " or b"\n" in lines or b"\r" in lines:
            return None
        events[0] = events[0][6:]
        try:        # one by one: a letter beyond Latin makes no wide string of its neighbours
            texts = list(map(bytes.decode, events))
        except UnicodeDecodeError:
            texts = [whole.decode("utf-8")]     # raises, and names the place in the whole
        self._parts, self._size = [rest] if rest else [], len(rest)
        return texts

    def _any_lines(self, data: bytes) -> list[str]:
        if b"\r" in data or self._half:
            data = self._half + data
            self._half = b"\r" if data.endswith(b"\r") else b""
            data = data[:len(data) - len(self._half)].replace(b"\r\n", b"\n")
            data = data.replace(b"\r", b"\n")
        cut = data.rfind(b"\n\n") + 2       # each byte is looked at once
        if cut == 1 and not (self._parts and data[:1] == b"\n" == self._parts[-1][-1:]):
            if data:
                self._parts.append(data)
                self._size += len(data)
            if self._size > MAX_EVENT_BYTES:
                raise ValueError(f"an event of more than {MAX_EVENT_BYTES} bytes")
            return []
        whole, rest = data[:cut], data[cut:]
        if self._parts:
            whole = b"".join(self._parts) + whole
        self._parts, self._size = [rest] if rest else [], len(rest)
        # whole events only, so a character is never cut; decoded once per read
        return self._events(whole.decode("utf-8"))

    def end(self) -> list[str]:
        """What an upstream left without its last empty line."""
        held, self._parts = b"".join(self._parts) + self._half.replace(b"\r", b"\n"), []
        return self._events(held.decode("utf-8")) if held.strip() else []


# ── 7. Neutral form ───────────────────────────────────────────────────────
# What every dialect is parsed to and rendered from.  A request is turns of
# blocks; an answer is a stream of deltas with one grammar:
#
#     Begin (BlockStart Piece* BlockEnd)* Finish      or Fault anywhere
#
# Pieces of one read may come together as a Run.  One block is open at a time,
# numbered from 0.  The Assembler makes the grammar hold, whatever the upstream
# sends; renderers rely on it.


class Kind(enum.Enum):
    """Kinds of blocks and pieces; also of the loose pieces that upstream parsers give."""
    TEXT = "text"
    THINKING = "thinking"
    SIGNATURE = "signature"     # loose: (raw, whether it stood on a thought)
    CALL = "call"               # loose: a ToolCall; without arguments they follow in pieces
    ARGUMENTS = "arguments"
    SERVER_CALL = "server call"     # of a tool that the upstream runs itself; loose: a ToolCall
    OPAQUE = "opaque"           # a whole block that only its own dialect understands: a dict
    CITATION = "citation"       # loose: a dict, of the open text: {"url", "title", "text"}, or one
                                # with "type" that only its own dialect understands
    FOUND = "found"             # what a search found, after its SERVER_CALL; loose: a Found
    GROUNDS = "grounds"         # loose: what an upstream says about sources, read at the end
    BLOCK_END = "block end"     # loose: where the upstream itself tells blocks apart
    IMAGE = "image"             # loose: (media type, base64)
    METER = "meter"             # loose: counters so far, {"input" with cached, "cached", "visible",
                                # "thinking", "output" in all}; missing ones stay as they were
    FINISH = "finish"           # loose: (Stop | None for "no usable answer", word of the upstream)

    __hash__ = object.__hash__  # Enum's own is Python: 0.1 us a look into every table


class Stop(enum.Enum):
    END = "end"
    LENGTH = "length"
    TOOL = "tool"
    SEQUENCE = "sequence"
    REFUSAL = "refusal"
    OVERFLOW = "overflow"

    __hash__ = object.__hash__


class Words(NamedTuple):
    anthropic: str
    chat: str
    gemini: str
    incomplete: str = ""        # why a Responses answer is, "" where it is complete


STOP_WORDS = {
    Stop.END: Words("end_turn", "stop", "STOP"),
    Stop.LENGTH: Words("max_tokens", "length", "MAX_TOKENS", "max_output_tokens"),
    Stop.TOOL: Words("tool_use", "tool_calls", "STOP"),
    Stop.SEQUENCE: Words("stop_sequence", "stop", "STOP"),
    Stop.REFUSAL: Words("refusal", "content_filter", "SAFETY", "content_filter"),
    Stop.OVERFLOW: Words("model_context_window_exceeded", "length", "MAX_TOKENS",
                         "max_output_tokens"),
}


@dataclass(frozen=True)
class Usage:
    """Tokens so far; `input_tokens` excludes those read from and written to a prompt cache,
    `output_tokens` includes thinking."""
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    thinking_tokens: int = 0
    written_tokens: int = 0
    searches: int = 0                   # of the web, by the upstream


# Blocks of a request

IMAGE_MAGIC = ((b"\x89PNG", "image/png"), (b"\xff\xd8\xff", "image/jpeg"), (b"GIF8", "image/gif"),
               (b"%PDF", "application/pdf"))
AUDIO_TYPES = {"wav": "audio/wav", "mp3": "audio/mpeg"}
MEDIA_TYPES = ("image/png", "image/jpeg", "image/gif", "image/webp", "image/heic", "image/heif",
               "application/pdf", *AUDIO_TYPES.values(), "audio/aac", "audio/ogg", "audio/flac",
               "video/mp4", "video/webm")
_BASE64, _URL_SAFE = re.compile(r"[A-Za-z0-9+/]+"), str.maketrans("-_", "+/")


@dataclass(frozen=True)
class Text:
    text: str
    citations: tuple = ()       # dicts, of an answer


@dataclass(frozen=True)
class Note(Text):
    """A system turn of mid-conversation that stands in a user turn."""


@dataclass(frozen=True)
class Media:
    """An image, document or sound: base64 without prefix or line breaks, or the `url` from which
    an upstream that does so fetches it."""
    media_type: str         # `image/*` where only the kind is known
    data: str
    url: str = ""
    name: str = ""          # of a document
    path: str = field(default="", compare=False)    # where it stands in the client's request


def media_of_data(data: Any, media_type: Any, path: str, name: str = "") -> Media:
    """The Media of base64 as clients write it: with prefix, line breaks or URL-safe letters; of the
    type that its first bytes tell, which is more often right than the declared one."""
    data = text_at(data, path)
    if data.startswith("data:"):
        head, _, data = data.partition(",")
        media_type = media_type or head[5:].partition(";")[0]
    if any(c in data for c in "\r\n\t "):
        data = "".join(data.split())
    data = data.translate(_URL_SAFE).rstrip("=")
    if not data or len(data) % 4 == 1 or not _BASE64.fullmatch(data):
        raise invalid(path, "base64 is required")
    data += "=" * (-len(data) % 4)
    start = base64.b64decode(data[:32])
    if start.startswith(b"RIFF") and start[8:12] in (b"WEBP", b"WAVE"):
        media_type = "image/webp" if start[8:12] == b"WEBP" else "audio/wav"
    media_type = next((kind for magic, kind in IMAGE_MAGIC if start.startswith(magic)), media_type)
    if media_type not in MEDIA_TYPES:
        raise invalid(path, f"of type {media_type!r}; one of {', '.join(MEDIA_TYPES)} is required")
    return Media(media_type, data, name=name, path=path)


# what those who fetch read as another host than we do
_TWO_READINGS = re.compile(r"[\\\x00-\x1f\x7f]|\A[^/]*//[^/?#]*@")
_PRIVATE_NAMES = (".localhost", ".localdomain", ".local", ".internal", ".intranet", ".lan", ".home",
                  ".corp", ".home.arpa")


def is_public_host(host: str) -> bool:
    """Whether a lower-case host is neither private, link-local nor a cloud's metadata, by what can
    be told without asking anybody."""
    import ipaddress
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        # signs beyond ASCII, and %2e, are read as dots and digits by those who fetch, and so is
        # what ends in a number: 127.1, 0x7f000001, 0177.0.0.1
        return bool(re.fullmatch(r"[a-z0-9._-]+\.[a-z0-9_-]*[a-z][a-z0-9_-]*", host)
                    and not re.search(r"\.0x[0-9a-f]*\Z", host)
                    and not host.endswith(_PRIVATE_NAMES))
    if address.version == 6:    # an IPv4 address may be hidden in it: mapped, 6to4, Teredo, NAT64
        return address.is_global and address in ipaddress.ip_network("2000::/3") and not (
            address.sixtofour or address.teredo)
    # the last is Azure's own, in a public range
    return address.is_global and not address.is_multicast and host != "168.63.129.16"


def media_of_url(url: Any, media_type: str, path: str, name: str = "") -> Media:
    """The Media that an upstream is to fetch; nothing here ever does.  Raises ProxyError for what
    points into a private network, or to a file: bad_request, which holds whoever serves."""
    host = scheme = ""
    with contextlib.suppress(ValueError):       # `http://[`: none at all
        parts = urllib.parse.urlsplit(text_at(url, path))
        host, scheme = (parts.hostname or "").rstrip(".").lower(), parts.scheme
    if not host or scheme not in ("http", "https", "gs"):
        why = "a data: or http(s) URL is required"
        if ":" not in url and not url.startswith(("//", "\\")):     # an upstream's own name of it
            raise invalid(path, why)
    elif _TWO_READINGS.search(url):
        why = "a URL without a user's name and without backslashes is required"
    elif scheme != "gs" and not is_public_host(host):
        why = "addresses of private networks are not passed on"
    else:
        return Media(media_type, "", url, name, path)
    raise ProxyError("bad_request", f"{path}: {why}")


@dataclass(frozen=True)
class Thinking:
    text: str
    signature: str      # as the client sent it: our envelope, a foreign one, or ""


@dataclass(frozen=True)
class ToolCall:
    id: str
    name: str
    arguments: dict | None
    signature: str = ""


@dataclass(frozen=True)
class ServerCall:
    """A call of a tool that the upstream ran itself."""
    id: str
    name: str
    arguments: dict


@dataclass(frozen=True)
class Found:
    """What a search of the web found: (url, title) of each source; or why there is nothing."""
    call_id: str
    name: str                   # of the tool
    sources: tuple = ()
    error: str = ""


@dataclass(frozen=True)
class Opaque:
    """A block of an answer that only its own dialect understands."""
    block: dict


@dataclass(frozen=True)
class ToolResult:
    call_id: str
    blocks: tuple
    is_error: bool = False


@dataclass(frozen=True)
class Turn:
    role: str           # user, assistant, or system in mid-conversation
    blocks: tuple
    # what renderers made of it, by what that depends on; None where it will not come again
    kept: dict | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Tool:
    name: str
    description: str
    schema: dict
    is_strict: bool = False     # the client wants arguments of exactly this schema
    kept: dict | None = field(default=None, compare=False, repr=False)      # as of a Turn


@dataclass(frozen=True)
class SearchWish:
    """The client wants the upstream to search the web, or to fetch pages; nothing else."""
    tool: str                   # web_search or web_fetch
    allowed: tuple = ()         # domains
    blocked: tuple = ()


@dataclass(frozen=True)
class ThinkingWish:
    """What the client asked for: `is_on` None means it did not say, which is no in one dialect and
    with the effort `auto` the model's own default in others; budget None means by effort."""
    is_on: bool | None = None
    budget_tokens: int | None = None
    effort: str = ""
    shows_text: bool = True
    shows: bool | None = None       # whether thoughts are to be told; None: where it is on

    @property
    def is_shown(self) -> bool:
        return self.is_on is True if self.shows is None else self.shows


@functools.lru_cache(maxsize=256)
def model_variant(name: str) -> tuple[str, ThinkingWish | None]:
    """(name, wish) of a name that may say how to think; see `split_variant`."""
    base, word = split_variant(name)
    if word in ("0", "off", "none"):
        return base, ThinkingWish(False)
    if word in ("-1", "auto"):
        return base, ThinkingWish(True)
    if word.isdecimal():
        return base, ThinkingWish(True, int(word[:7]))
    return base, ThinkingWish(True, None, word) if word else None


@dataclass(frozen=True)
class Native:
    """A request as it came, for an upstream that speaks the client's own language."""
    dialect: str
    raw: bytes                          # a JSON object
    headers: tuple = ()                 # (name, value) of those the upstream is to see
    query: str = ""


ANY_OBJECT = {"type": "object"}         # the schema of "any JSON object"
MORE_FIELDS = {     # what clients may give beyond the common fields: least and most, None for text
    "seed": (-(1 << 63), 1 << 63), "presence_penalty": (-2, 2), "frequency_penalty": (-2, 2),
    "verbosity": None, "service_tier": None, "user": None}


def is_paired(turns: Iterable[Turn], minds_strays: bool = True) -> bool:
    """Whether every call is answered before the model speaks again, and nothing else is."""
    waiting: set[str] = set()
    last_role = ""
    for turn in turns:
        if turn.role == "system":
            continue
        if turn.role == "assistant" and waiting and last_role != "assistant":
            return False
        last_role = turn.role
        for block in turn.blocks:
            if isinstance(block, ToolCall):
                waiting.add(block.id)
            elif isinstance(block, ToolResult):
                if block.call_id not in waiting and minds_strays:
                    return False
                waiting.discard(block.call_id)
    return not waiting


class _Once:
    """A property that is found once; threads may find the same twice.  functools.cached_property
    has one lock for all requests up to Python 3.11: 0.5 us against 0.2, and threads that wait."""

    def __init__(self, find: Callable[[Any], Any]):
        self.find, self.name, self.__doc__ = find, find.__name__, find.__doc__

    def __get__(self, owner: Any, kind: Any = None) -> Any:
        if owner is None:
            return self
        found = owner.__dict__[self.name] = self.find(owner)
        return found


@dataclass(frozen=True, init=False)
class Request:
    model: str                          # as the client named it
    turns: tuple
    wanted: str = ""                    # the model without an ending about thinking
    system: tuple = ()                  # texts, one per block
    tools: tuple = ()
    tool_choice: tuple = ("auto", "")   # auto, any, none, or tool with its name
    one_call: bool = False              # no parallel calls wanted
    max_tokens: int | None = None       # None: as many as the model has
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: tuple = ()
    thinking: ThinkingWish = ThinkingWish()
    json_schema: dict | None = None     # the answer must be JSON of this schema, or ANY_OBJECT
    more: Mapping = field(default_factory=dict)     # of MORE_FIELDS, schema_name, schema_strict
    search: SearchWish | None = None
    session: str = ""                   # same for all requests of one conversation
    agent: str = ""                     # which of the session's agents asks, "" the main one
    parent: str = ""                    # the agent that started it
    is_streaming: bool = False
    small: str = ""                     # which of a client's small requests it is, "" a real turn
    window_tokens: int = CLIENT_WINDOW  # what the client takes for the model's window
    native: Native | None = None
    refusal: ProxyError | None = None   # why only an upstream of its own dialect can take it
    dialect: str = "anthropic"          # of the client
    ext: Mapping = field(default_factory=dict)      # what only its own dialect's renderer reads
    left_out: tuple = ()                # hosted tools and blocks that no other service takes
    routed: str = ""                    # the owner's rule or role that gave it its model

    def __init__(self, model: str, turns: tuple, **given: Any):
        # what is not given is read off the class: 1.7 us against 3.7 for a dataclass's own
        if not given.keys() <= self.__dataclass_fields__.keys():
            raise TypeError(f"of {', '.join(given)} a Request has not all")
        self.__dict__.update({"model": model, "turns": turns, "more": {}, "ext": {}, **given})

    def is_native_to(self, provider: Provider) -> bool:
        """Whether the upstream speaks the client's own language: nothing is translated then."""
        return self.native is not None and not provider.envelope and (
            self.native.dialect == provider.speaking(self.dialect).dialect) and not self.is_broken

    @_Once
    def is_broken(self) -> bool:
        """Whether calls and results miss each other so that every upstream would refuse it as it
        is: translation mends them.  Anthropic's relay and Gemini's mend more by themselves."""
        dialect = self.native.dialect if self.native else "anthropic"
        if dialect == "anthropic" or self.refusal is not None or self.left_out:
            return False
        kinds = {str(item.get("type")) for item in objects_of(
            self.ext.get("expanded") or self.ext.get("input"))}
        return not is_paired(self.turns, dialect != "gemini") and not any(
            kind == "item_reference" or kind.endswith("_call") for kind in kinds - {
                "function_call", "custom_tool_call"})

    @_Once
    def media(self) -> tuple:
        """Every Media of the conversation, those in results of tools too."""
        blocks = [b for t in self.turns for b in t.blocks]
        blocks += [inner for b in blocks if isinstance(b, ToolResult) for inner in b.blocks]
        return tuple(b for b in blocks if isinstance(b, Media))

    @_Once
    def conversation(self) -> str:
        """32 hex digits that tell this conversation from others: of the client's session, else of
        how the conversation begins."""
        seed = self.session
        if not seed:
            first = next((b.text for t in self.turns if t.role == "user"
                          for b in t.blocks if isinstance(b, Text)), "")
            seed = "".join([text[:4000] + "\0" for text in (*self.system, first)])
        return hashlib.sha256(seed.encode("utf-8", "replace")).hexdigest()[:32]


_FETCHED = frozenset(("image_url", "file_url", "file_data", "fileUri", "file_uri"))


def refuse_private_urls(value: Any, holder: str = "") -> None:
    """Raises ProxyError where a body of whatever form has an upstream fetch what is private.  What
    tools are called with is fetched by nobody."""
    if isinstance(value, list):
        for item in value:
            refuse_private_urls(item, holder)
    for name, item in object_of(value).items():
        is_fetched = name in _FETCHED or name == "url" and holder in ("image_url", "source")
        if is_fetched and isinstance(item, str) and ":" in item and not item.startswith("data:"):
            media_of_url(item, "", name)
        elif name not in ("input", "arguments", "args") or isinstance(item, list):
            refuse_private_urls(item, name)


def fields_for_others(read: Callable[[], dict], raw: bytes) -> dict:
    """The fields of a Request that other dialects need.  A body that `read` refuses may still go as
    it is, where it came `raw`: the reason stands in `refusal` then."""
    try:
        return read()
    except ProxyError as err:
        if not raw or err.kind not in ("invalid_request", "no_response"):
            raise
        refuse_private_urls(json_decode(raw))       # it was not read to its end
        return {"turns": (), "refusal": err}


class Target(NamedTuple):
    """Where a request goes upstream."""
    model: Model
    provider: Provider
    upstream_id: str
    project: str = ""
    hardens_tools: bool = False     # tells parameters in descriptions too


_SESSION_HEADERS = ("session-id", "session_id", "x-session-id", "x-session-affinity", "thread-id",
                    "x-client-request-id")
_SESSION_FIELDS = ("session_id", "sessionId", "conversation_id", "prompt_cache_key")


def session_key(body: Mapping, headers: Mapping[str, str]) -> str:
    """What all requests of one conversation share; "" when the client does not say."""
    for given, names in ((headers, _SESSION_HEADERS), (body, _SESSION_FIELDS)):
        if not given.keys().isdisjoint(names):      # mostly it does not
            for name in names:
                value = given.get(name)
                if value and isinstance(value, str):
                    return str(value)
    return ""


# Deltas of an answer.  Nobody changes one; they are not frozen because a frozen one of five fields
# takes 0.6 us to make, and this 0.15.

@dataclass
class Begin:
    usage: Usage


@dataclass
class BlockStart:
    index: int
    kind: Kind          # TEXT, THINKING, CALL, SERVER_CALL, FOUND or OPAQUE
    id: str = ""
    name: str = ""
    block: Any = None   # of an opaque one its dict, else a Found


@dataclass
class Piece:
    index: int
    kind: Kind          # TEXT, THINKING, ARGUMENTS, SIGNATURE or CITATION (as JSON)
    text: str


class Run(NamedTuple):      # made for every read: 0.3 us against 0.7 as a dataclass
    """Texts or thoughts that came in one read and are Pieces one by one: `raw` as they stand in
    JSON, ASCII and without quotes, for renderers that copy them; `text` is what all of them say."""
    index: int
    kind: Kind          # TEXT or THINKING
    raw: list
    text: str

    def pieces(self) -> Iterator[Piece]:
        return (Piece(self.index, self.kind, told_by(raw)) for raw in self.raw)


@dataclass
class BlockEnd:
    index: int


@dataclass
class Finish:
    stop: Stop
    usage: Usage
    sequence: str | None = None
    explanation: str = ""       # of a refusal


@dataclass
class Fault:
    error: ProxyError


# Counting.  text_tokens looks at the bytes of a text through a few alphabets, in each of which a
# class of bytes is one letter, and counts signs: every sign weighs so many tokens.  Only
# bytes.translate and bytes.count walk the text.  The weights were fitted (bounded least squares on
# relative errors, one column per family) over half of 1300 pieces of text in 40 categories to ctok
# 1.3.0's rebuilt tokenizer of Claude 3 to 4.6, to Gemma 3's, taken for Gemini's, and o200k_base.
# On the other half the worst category is 10 % off, agents' conversations and lists of tools 3 % or
# less; single pieces of a few hundred letters may be 20 % off.

def _alphabet(rest: str, letters: dict) -> bytes:
    """A table for bytes.translate: each byte of a group becomes the letter of the group."""
    table = bytearray(rest.encode() * 256)
    for letter, group in letters.items():
        for byte in group:
            table[byte] = ord(letter)
    return bytes(table)


TOKEN_ALPHABETS = {
    "raw": None,
    "rare": _alphabet(" ", {".": b"jqxzkwvyJQXZKWVY"}),
    "case": _alphabet("p", {
        " ": b" \t", "\n": b"\r\n", "0": range(48, 58), "A": range(65, 91), "a": range(97, 123),
        "h": range(0x80, 0xc0), "e": range(0xc0, 0x100)}),
    "sound": _alphabet("p", {
        " ": b" \t", "v": b"aeiouyAEIOUY", "c": b"bcdfghjklmnpqrstvwxzBCDFGHJKLMNPQRSTVWXZ"}),
}
TOKEN_SCRIPTS = _alphabet("I", {            # of the high bytes of UTF-16
    "x": b"\0", "l": b"\1\2\x1e", "G": b"\3", "C": b"\4", "W": b"\5", "B": range(6, 9),
    "T": b"\x0e", "s": range(0x20, 0x30), "k": b"\x30\x31\xff", "H": range(0x34, 0xa0),
    "K": range(0xac, 0xd8), "E": range(0xd8, 0xe0)})
TOKEN_FAMILIES = ("claude", "gemini", "gpt-oss")
TOKEN_SIGNS = (         # alphabet, sign, its tokens by family
    ("raw", b"en", 1.18, 0.16, 0.56),           # common in English, whose words are cheap
    ("raw", b"(", 1.29, 0.64, 0.00),
    ("raw", b";", 0.26, 0.31, 0.36),
    ("raw", b".", 0.80, 0.65, 0.41),
    ("raw", b"\\", 1.44, 0.70, 1.21),
    ("raw", b"\n\t", 1.68, 1.45, 1.48),
    ("rare", b".", 0.26, 0.74, 0.95),           # rare letters
    ("case", b"p", 0.27, 0.23, 0.23),           # p punctuation, a small letter, A capital, 0 digit
    ("case", b"\n", 0.86, 1.23, 0.69),
    ("case", b"A", 0.70, 0.35, 0.26),
    ("case", b"0", 0.25, 1.07, 0.25),
    ("case", b" 0", 1.99, 1.36, 1.67),
    ("case", b"p0", 1.55, 0.20, 1.45),
    ("case", b"0a", 2.07, 1.00, 1.95),
    ("case", b"pa", 1.18, 1.40, 1.02),
    ("case", b" p", 0.79, 0.71, 0.68),
    ("case", b"  ", 0.13, 0.10, 0.06),
    ("case", b"aaaaaaaa", 0.86, 0.40, 0.40),    # long words
    ("sound", b" cv", 1.43, 1.35, 1.29),        # c consonant, v vowel
    ("sound", b"cccc", 4.00, 1.54, 1.58),       # random letters
    # of text beyond ASCII only
    ("case", b"e", 1.44, 0.88, 1.09),           # letters of Western Europe
    ("case", b"h", 1.52, 0.90, 0.90),           # ... its signs
    ("script", b"l", 1.83, 0.58, 0.64),         # letters of the rest of Europe, of Vietnam
    ("script", b"G", 0.73, 0.39, 0.39),         # Greek
    ("script", b"C", 0.41, 0.25, 0.28),         # Cyrillic
    ("script", b"W", 0.80, 0.52, 0.45),         # Hebrew, Armenian
    ("script", b"B", 0.77, 0.37, 0.35),         # Arabic
    ("script", b"I", 0.84, 0.29, 0.37),         # Indic, and every script not named here
    ("script", b"T", 0.96, 0.32, 0.42),         # Thai, Lao
    ("script", b"k", 0.76, 0.40, 0.70),         # kana; signs of East Asia
    ("script", b"H", 1.21, 0.69, 0.87),         # Han
    ("script", b"K", 1.35, 0.64, 0.74),         # Hangul
    ("script", b"s", 0.53, 0.15, 0.15),         # dashes, arrows, boxes
    ("script", b"xs", 0.40, 0.40, 0.40),        # ... runs of them
    ("script", b"E", 2.20, 0.40, 1.94),         # halves of surrogate pairs: emoji
)
ASCII_SIGNS = 20        # the first signs; the others need a look at the scripts
TOKENS_PER_BYTE = 0.01  # so that nothing is free


def text_tokens(text: str, family: str = "claude") -> float:
    """A quick estimate: linear in time, deterministic, nearly additive."""
    raw = text.encode("latin-1", "ignore")
    views = {name: raw.translate(table) for name, table in TOKEN_ALPHABETS.items()}
    signs = TOKEN_SIGNS[:ASCII_SIGNS]
    if not text.isascii():
        views["script"] = text.encode("utf-16-le", "surrogatepass")[1::2].translate(TOKEN_SCRIPTS)
        signs = TOKEN_SIGNS
    column = 2 + TOKEN_FAMILIES.index(family)
    total = TOKENS_PER_BYTE * len(raw)
    for sign in signs:
        if sign[column]:
            total += sign[column] * views[sign[0]].count(sign[1])
    return total


PDF_PAGE = re.compile(rb"/Type ?/Page(?!s)")


def image_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of a PNG, GIF, WEBP or JPEG from its first bytes, None where they do not
    tell.  Never raises."""
    size = (0, 0)
    if data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR":
        size = (int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big"))
    elif data[:6] in (b"GIF87a", b"GIF89a"):
        size = (int.from_bytes(data[6:8], "little"), int.from_bytes(data[8:10], "little"))
    elif data[:4] == b"RIFF" and data[8:16] == b"WEBPVP8X" and len(data) >= 30:
        size = (int.from_bytes(data[24:27], "little") + 1,
                int.from_bytes(data[27:30], "little") + 1)
    elif data[:4] == b"RIFF" and data[8:16] == b"WEBPVP8L" and data[20:21] == b"\x2f":
        bits = int.from_bytes(data[21:25], "little")
        size = ((bits & 0x3fff) + 1, (bits >> 14 & 0x3fff) + 1) if len(data) >= 25 else size
    elif data[:4] == b"RIFF" and data[8:16] == b"WEBPVP8 " and data[23:26] == b"\x9d\x01\x2a":
        size = (int.from_bytes(data[26:28], "little") & 0x3fff,
                int.from_bytes(data[28:30], "little") & 0x3fff)
    elif data[:2] == b"\xff\xd8":
        place = 2
        while data[place:place + 1] == b"\xff" and place + 9 <= len(data):
            marker = data[place + 1]            # C0..CF start a frame, but for C4, C8 and CC
            if 0xc0 <= marker <= 0xcf and marker not in (0xc4, 0xc8, 0xcc):
                size = (int.from_bytes(data[place + 7:place + 9], "big"),
                        int.from_bytes(data[place + 5:place + 7], "big"))
                break
            place += 1 if marker == 0xff else 2 + int.from_bytes(data[place + 2:place + 4], "big")
    return size if size[0] > 0 and size[1] > 0 else None


def media_tokens(data: bytes, media_type: str, family: str = "claude") -> int:
    """By the rules of the vendors.  An image whose size is not found counts 1000."""
    if media_type == "application/pdf":
        return 258 * max(1, len(PDF_PAGE.findall(data)))
    size = image_size(data)
    if size is None:
        return 1000
    width, height = size
    if family == "claude":
        return max(1, min(1600, width * height // 750))
    if max(size) <= 384:
        return 258
    return 258 * -(-width // 768) * -(-height // 768)


def quick_tokens(text: str) -> float:
    """The cheapest guess, for what is counted piece by piece: four ASCII characters a token, one
    and a half of others."""
    if text.isascii():
        return len(text) / 4
    plain = len(text.encode("ascii", "ignore"))     # ten times as fast as a look at each letter
    return plain / 4 + (len(text) - plain) / 1.5


def _block_tokens(block: Any, family: str) -> float:
    if isinstance(block, Text):
        return text_tokens(block.text, family)
    if isinstance(block, Media):
        is_pdf = block.media_type == "application/pdf"
        head = block.data if is_pdf else block.data[:128 << 10]     # where an image's size stands
        return media_tokens(base64.b64decode(head), block.media_type, family)
    if isinstance(block, ToolCall):
        return 8 + text_tokens(block.name, family) + text_tokens(json_encode(block.arguments),
                                                                 family)
    if isinstance(block, ToolResult):
        return 8 + sum(_block_tokens(b, family) for b in block.blocks)
    return 0


_LONG_DATA = re.compile(r'"[A-Za-z0-9+/=_-]{2000,}"')       # an image, not words


def estimate_tokens(request: Request, family: str = "claude") -> int:
    """Input tokens of a request for a family of TOKEN_FAMILIES, for count_tokens and for streams
    that begin before the upstream says a number.  Deterministic and roughly additive."""
    if request.refusal is not None and request.native:
        text, media = _LONG_DATA.subn('""', request.native.raw.decode("utf-8"))
        return max(1, int(text_tokens(text, family))) + 1000 * media
    total = 7 + sum(text_tokens(text, family) for text in request.system)
    for tool in request.tools:
        total += 8 + text_tokens(tool.name + tool.description, family) + text_tokens(
            json_encode(tool.schema), family)
    for turn in request.turns:
        total += 4 + sum(_block_tokens(block, family) for block in turn.blocks)
    return max(1, int(total + 0.999))


def token_family(model: Model) -> str:
    return model.family if model.family in TOKEN_FAMILIES else "gemini"


# Assembler

class AnswerShape(NamedTuple):
    """What the client of one request can take, and how names and ids are turned back."""
    shows_thinking: bool = True         # thinking blocks may be sent at all
    thinking_text: bool = True          # ... with their text
    signs_calls: bool = False           # calls have their signature with them, shown or not
    one_call: bool = False
    wrap_signature: Callable[[str, str], str] = lambda raw, kind: raw
    remember: Callable[[str, str], None] = lambda call_id, raw: None
    remember_text: Callable[[str, str], None] = lambda text, raw: None
    client_call: Callable[[str, dict], tuple] = lambda name, arguments: (name, arguments)
    estimate_input: Callable[[], int] = lambda: 0       # asked where the upstream reports nothing
    used_ids: frozenset = frozenset()
    call_prefix: str = "toolu_"     # of a call's id where the upstream gives none
    prefill: str = ""       # the client's beginning of the answer, which is not to be repeated
    pick_json: Callable[[str], str] | None = None       # takes the wanted JSON out of a text
    # sources come last and belong first: (text, GROUNDS) -> loose pieces; None holds nothing back
    place_sources: Callable[[str, list], list] | None = None


class Rendered(NamedTuple):
    """A request in an upstream's language."""
    body: Any                   # a dict, or JSON as bytes that go as they are
    headers: dict[str, str]     # beside those of the provider
    shape: AnswerShape
    mended: Mapping[str, int] = {}      # what was repaired on the way, how many times
    sent: tuple = ()            # thinking signatures that went along
    told: Mapping[int, tuple] = {}      # JSON of the body's members that was made before

    @property
    def raw(self) -> bytes:
        body = self.body
        return body if isinstance(body, bytes) else json_encode_told(body, self.told).encode(
            "ascii")


_CALL_ID = re.compile(r"[a-zA-Z0-9_-]+")


class Assembler:
    """Loose pieces (Kind, value) in, deltas of the grammar out.  Owns the open block, the usage
    and the finish; the answer begins with its first content or its finish, not before."""

    def __init__(self, shape: AnswerShape):
        self.shape = shape
        self.open: Kind | None = None
        self.index = -1
        self.counts: dict[str, int] = {}
        self.begun = False
        self.stop: tuple | None = None      # loose FINISH value
        self.calls = 0
        self.has_text = self.has_thinking = self.has_opaque = False
        self._signature = ""                # of the open thinking block, sent when it closes
        self._thought: list[str] = []       # texts of the last thought
        self._late_signature = ""
        self._late: list[str] = []          # thoughts after text: [A4] holds them until more comes
        self._letters = 0                   # sent so far, for upstreams that report no usage
        self._is_muted = False              # a call that is left out: so are its arguments
        self._streamed: list[str] = []      # arguments of the last call, where they came in pieces
        self._ids: set[str] = set()         # of this answer's calls
        self._grounds: list = []
        self._held: list[str] | None = [] if shape.place_sources else None  # text of a search

    def feed(self, pieces: Iterable[tuple[Kind, Any]]) -> list:
        out: list = []
        for kind, value in pieces:
            self._ACTIONS[kind](self, value, out)
        return out

    def copies(self, kind: Kind, raw: str, may_open: bool) -> bool:
        """Whether a text or thought, `raw` as in JSON and not empty, would only be told, in the
        open block or, where it `may_open` one, in its own: nothing is held back or left out."""
        if kind is Kind.TEXT:
            takes = not self._late and self._held is None and (
                self.has_text or not told_by(raw).isspace())
        else:
            takes = (self.shape.shows_thinking and self.shape.thinking_text
                     and self.open is not Kind.TEXT)
        return takes and (may_open or self.open is kind and not self._signature)

    def opening(self, kind: Kind) -> list:
        """What goes before a Run of pieces of a kind that it `copies`."""
        out: list = []
        if self.open is not kind or self._signature:
            self._switch(kind, out)
        return out

    def run(self, raw: list[str], text: str) -> Run:
        """The Run of pieces of the kind that is open."""
        if self.open is Kind.TEXT:
            self.has_text = True
            self._letters += len(text)
        else:
            self.has_thinking = True
            self._thought.append(text)
        return Run(self.index, self.open, raw, text)

    def end(self) -> list:
        """The upstream's end.  Raises ProxyError `cut` where no finish was seen, `empty` where
        nothing usable came: a truncated answer never looks complete."""
        if self.stop is None and not self.calls:
            raise ProxyError("cut", "the upstream ended its answer without a finish")
        out: list = []
        held, self._held = self._held, None
        if held or self._grounds and held is not None:
            out += self.feed(self.shape.place_sources("".join(held), self._grounds))
        stop, word = self.stop or (Stop.TOOL, "")
        is_sequence = stop is Stop.SEQUENCE and bool(word)
        has_content = self.has_text or self.calls or self.has_thinking or self.has_opaque
        if stop is None and not self.begun:
            raise ProxyError("empty", f"the upstream gave no usable answer ({word})")
        if not has_content and stop in (Stop.END, Stop.TOOL, None):
            raise ProxyError("empty", "the upstream gave an empty answer")
        self._begin(out)
        if not self.has_text and not self.calls and stop is Stop.END:
            self._switch(Kind.TEXT, out)        # only thinking came: some clients need a text
        self._close(out)
        is_cut = stop is Stop.LENGTH and bool(self._streamed) and not is_json(
            "".join(self._streamed))        # in the middle of its last call
        if (self.calls or stop is Stop.TOOL) and not is_cut:
            stop = Stop.TOOL if self.calls else Stop.END
        out.append(Finish(stop or Stop.END, self.known_usage(), word if is_sequence else None,
                          word if stop is Stop.REFUSAL else ""))
        return out

    def known_usage(self) -> Usage:
        """The upstream's numbers; estimates where it gave none, since a client that reads 0
        never compacts its conversation."""
        get = self.counts.get
        cached, thinking = get("cached", 0), get("thinking", 0)
        given = get("input") or self.shape.estimate_input()
        output = max(get("visible", 0) + thinking, get("output", 0))
        if not output and self._letters:
            output = self._letters // 4 + 1
        written = get("written", 0)
        return Usage(max(0, given - cached - written), cached, output, thinking, written,
                     get("searches", 0))

    def _begin(self, out: list) -> None:
        if not self.begun:
            self.begun = True
            out.append(Begin(self.known_usage()))

    def _switch(self, kind: Kind, out: list, call_id: str = "", name: str = "",
                block: Any = None) -> None:
        self._begin(out)
        self._close(out)
        self.index += 1
        self.open = kind
        if kind is Kind.THINKING:
            self._thought = []
        out.append(BlockStart(self.index, kind, call_id, name, block))

    def _close(self, out: list) -> None:
        if self.open is None:
            return
        if self._signature:
            out.append(Piece(self.index, Kind.SIGNATURE, self._signature))
            self._signature = ""
        out.append(BlockEnd(self.index))
        self.open = None

    def _text(self, text: str, out: list) -> None:
        if self._held is not None:
            self._held.append(text)
            return
        if not text or (not self.has_text and text.isspace()):
            return              # blank text before any other opens no block
        if self._late:
            self._flush_late(out)
        if self.open is not Kind.TEXT:
            self._switch(Kind.TEXT, out)
            self.has_text = True
        self._letters += len(text)
        out.append(Piece(self.index, Kind.TEXT, text))

    def _think(self, text: str | None, out: list) -> None:
        """`text` None opens a thought that may stay without any."""
        self.has_thinking = True
        if not self.shape.shows_thinking or text == "":
            return
        if self.open is Kind.TEXT:
            # a thinking block after the last text empties the result of `claude -p`
            self._late.append(text or "")
            return
        if self._signature:
            self._close(out)    # signed text is complete; this is the next thought
        if self.open is not Kind.THINKING:
            self._switch(Kind.THINKING, out)
        if text is None:
            return
        self._thought.append(text)
        if self.shape.thinking_text:
            out.append(Piece(self.index, Kind.THINKING, text))

    def _flush_late(self, out: list) -> None:
        texts, self._late = self._late, []
        raw, self._late_signature = self._late_signature, ""
        self._close(out)
        self._think("".join(texts) or None, out)
        if raw:
            self._signature_piece((raw, True), out)

    def _signature_piece(self, value: tuple[str, bool], out: list) -> None:
        """`value` is (raw, whether it stood on a thought): a thought that shows no text gets its
        block at the beginning, a later signature replaces the earlier; one that comes when its
        thought is closed is only remembered, and one on text has nobody to carry it."""
        raw, is_thought = value
        if is_thought and self._late:
            self._late_signature = raw
            return
        if is_thought and self.index < 0 and self.shape.shows_thinking:
            self._switch(Kind.THINKING, out)
        if self.open is Kind.THINKING:
            self._signature = self.shape.wrap_signature(raw, "t")
        if is_thought and self._thought:
            self.shape.remember_text("".join(self._thought), raw)

    def _call(self, call: ToolCall, out: list) -> None:
        self._is_muted = self.shape.one_call and self.calls > 0
        if self._is_muted:
            return
        if self._late:
            self._flush_late(out)
        if call.signature and (self.shape.shows_thinking or self.shape.signs_calls):
            if self.open is not Kind.THINKING:
                # a carrier: clients echo thinking blocks only
                self._switch(Kind.THINKING, out)
            self._signature = self.shape.wrap_signature(call.signature, "f")
        call_id = call.id
        if not _CALL_ID.fullmatch(call_id) or (
                call_id in self._ids or call_id in self.shape.used_ids):
            call_id = new_id(self.shape.call_prefix)
        self._ids.add(call_id)
        if call.signature:
            self.shape.remember(call_id, call.signature)
        name, arguments = self.shape.client_call(call.name, call.arguments or {})
        self._switch(Kind.CALL, out, call_id, name)
        out.append(Piece(self.index, Kind.ARGUMENTS, ""))
        self.calls += 1
        self._streamed = []
        if call.arguments is not None:
            self._arguments(json_encode(arguments), out)
            self._close(out)

    def _arguments(self, text: str, out: list) -> None:
        if not self._is_muted and self.open in (Kind.CALL, Kind.SERVER_CALL):
            self._letters += len(text)
            self._streamed.append(text)
            for start in range(0, len(text), 8192):
                out.append(Piece(self.index, Kind.ARGUMENTS, text[start:start + 8192]))

    def _server_call(self, call: ToolCall, out: list) -> None:
        self._switch(Kind.SERVER_CALL, out, call.id, call.name)
        self._streamed = []
        if call.arguments is not None:
            self._arguments(json_encode(call.arguments), out)
            self._close(out)

    def _opaque(self, block: dict, out: list) -> None:
        self._switch(Kind.OPAQUE, out, block=block)
        self.has_opaque = True

    def _found(self, found: Found, out: list) -> None:
        self._switch(Kind.FOUND, out, block=found)
        self._close(out)
        self.has_opaque = True

    def _cite(self, citation: dict, out: list) -> None:
        if self.open is Kind.TEXT:
            out.append(Piece(self.index, Kind.CITATION, json_encode(citation)))

    def _block_end(self, value: Any, out: list) -> None:
        self._is_muted = False
        if not self._late:
            self._close(out)

    def _image(self, image: tuple[str, str], out: list) -> None:
        media_type, data = image
        self._text(f"[{media_type}, {len(data) * 3 // 4096} KB]", out)

    def _ground(self, value: dict, out: list) -> None:
        self._grounds.append(value)

    def _meter(self, counts: dict[str, int], out: list) -> None:
        self.counts.update(counts)

    def _finish(self, value: tuple, out: list) -> None:
        if self.stop is None or self.stop[0] is Stop.END:
            self.stop = value

    # one table for all: bound methods in each took 1.5 us of an answer, and made a cycle
    _ACTIONS = {
        Kind.TEXT: _text, Kind.THINKING: _think, Kind.CALL: _call, Kind.IMAGE: _image,
        Kind.SIGNATURE: _signature_piece, Kind.METER: _meter, Kind.FINISH: _finish,
        Kind.ARGUMENTS: _arguments, Kind.SERVER_CALL: _server_call, Kind.OPAQUE: _opaque,
        Kind.CITATION: _cite, Kind.BLOCK_END: _block_end, Kind.FOUND: _found,
        Kind.GROUNDS: _ground}


def _fenced(text: str) -> str:
    """What stands in the first fence, "" where there is none."""
    begin = text.find("```")
    line_end = text.find("\n", begin)
    end = text.find("\n```", line_end)
    is_json = text[begin + 3:line_end].strip() in ("", "json")
    return text[line_end + 1:end] if -1 not in (begin, line_end, end) and is_json else ""


def first_json(text: str, kind: str = "object", in_prose: bool = True) -> str:
    """The JSON value of a type inside `text`, which models like to wrap in fences or, `in_prose`,
    in words; the text itself where there is none, or where it was cut."""
    begins = {"object": "{", "array": "["}.get(kind, "")
    for candidate in filter(None, (text, _fenced(text))):
        with contextlib.suppress(ValueError, RecursionError):       # no JSON, or more than that
            json.loads(candidate)
            return candidate.strip()
    starts = [m.start() for m in re.finditer(re.escape(begins), text)][:20] if (
        begins and in_prose) else []
    for start in starts:
        try:
            _, end = json.JSONDecoder().raw_decode(text, start)
            return text[start:end]
        except json.JSONDecodeError as err:
            if err.pos >= len(text.rstrip()):
                return text             # cut in the middle of its value
        except (ValueError, RecursionError):
            continue
    return text


class TextGate:
    """Deltas in, deltas out: ends the answer at a stop sequence, or far beyond `max_tokens` of
    visible text (thinking counts inside the upstream's own limit), and cuts a repeated `prefill`
    off its start.  Holds back the longest tail that could still become a stop sequence; all of a
    text that is to be JSON, to take out its value by `pick`."""

    def __init__(self, stop_sequences: Iterable[str], max_tokens: int | None, prefill: str,
                 pick: Callable[[str], str] | None, usage: Callable[[], Usage]):
        self.usage, self.prefill, self.pick = usage, prefill, pick
        self.sequences = [s for s in stop_sequences if s.strip()]
        # our count is a guess and the upstream has the true limit: this only stops a runaway
        self.budget = (max_tokens or 1 << 40) * 1.25 + 16
        self.done = False
        self._tail, self._tokens = "", 0.0
        self._said: list[str] = []
        self._look_at, self._counted = self.budget, 0.0
        self._longest = max(map(len, self.sequences), default=0)

    def feed(self, deltas: list) -> list:
        out: list = []
        if self.done:
            return out
        for delta in deltas:
            if type(delta) is Piece and delta.kind is Kind.TEXT:
                self._text(delta.index, delta.text, out, False)
            elif self._tail and type(delta) is BlockEnd:
                self._text(delta.index, "", out, True)
                if not self.done:
                    out.append(delta)
            else:
                out.append(delta)
            if self.done:
                break
        return out

    @property
    def is_open(self) -> bool:
        """Whether texts go through as they come, as long as there are not too many."""
        return not (self.sequences or self.prefill or self.pick or self._tail)

    def passes(self, text: str) -> bool:
        """Whether the texts of a Run go through an open gate, which notes them then; else each of
        them has to be looked at."""
        tokens = self._tokens + quick_tokens(text)
        if tokens > self._look_at:
            return False
        self._tokens = tokens
        self._said.append(text)
        return True

    def _is_runaway(self) -> bool:
        """Whether there is far more text than was asked for.  The quick guess is high for indented
        text; the better one, which costs more, is taken where that is above the budget."""
        if self._tokens <= self._look_at:
            return False
        self._counted += text_tokens("".join(self._said), "gemini")
        self._said = []
        self._look_at = self._tokens + max(self.budget / 8, self.budget - self._counted)
        return self._counted > self.budget

    def _text(self, index: int, text: str, out: list, is_last: bool) -> None:
        text, self._tail = self._tail + text, ""
        if self.pick and not is_last:
            self._tail = text
            return
        if self.pick:
            text = self.pick(text)
        if self.prefill and not is_last:
            if len(text) < len(self.prefill) and self.prefill.startswith(text):
                self._tail = text
                return
            text, self.prefill = text[len(self.prefill) * text.startswith(self.prefill):], ""
        # the earliest match counts, of those the longest; one that may still grow is waited for
        hit = min(((at, -len(s), s) for s in self.sequences for at in (text.find(s),) if at >= 0),
                  default=None)
        keep = 0
        if self.sequences and not is_last:
            keep = next((n for n in range(min(self._longest - 1, len(text)), 0, -1)
                         if any(s.startswith(text[-n:]) and s != text[-n:]
                                for s in self.sequences)), 0)
        if hit and not (keep and len(text) - keep <= hit[0]):
            text = text[:hit[0]]
        else:
            hit = None
            text, self._tail = text[:len(text) - keep], text[len(text) - keep:]
        self._tokens += quick_tokens(text)
        self._said.append(text)
        if text:
            out.append(Piece(index, Kind.TEXT, text))
        if hit or self._is_runaway():
            self.done = True
            out.append(BlockEnd(index))
            usage = self.usage()
            usage = replace(usage, output_tokens=max(usage.output_tokens, int(self._tokens), 1))
            stop = Stop.SEQUENCE if hit else Stop.LENGTH
            out.append(Finish(stop, usage, hit[2] if hit else None))


# Folding

@dataclass(frozen=True)
class Reply:
    """A whole answer: the fold of its stream.  Blocks are Text, Thinking, ToolCall, ServerCall,
    Found and Opaque."""
    blocks: tuple
    finish: Finish


def _whole_block(start: BlockStart, parts: Mapping[Kind, list]) -> Any:
    kind, get = start.kind, parts.get
    if kind is Kind.TEXT:
        citations = get(Kind.CITATION)
        return Text("".join(get(kind, ())), tuple(map(json.loads, citations)) if citations else ())
    if kind is Kind.THINKING:
        return Thinking("".join(get(kind, ())), "".join(get(Kind.SIGNATURE, ())))
    if kind in (Kind.OPAQUE, Kind.FOUND):
        return Opaque(start.block) if kind is Kind.OPAQUE else start.block
    made = ToolCall if kind is Kind.CALL else ServerCall
    arguments = json_told("".join(get(Kind.ARGUMENTS, ())) or "{}")
    return made(start.id, start.name, arguments) if isinstance(arguments, dict) else None


def collect(deltas: Iterable) -> Reply:
    """The Reply of a complete stream; a Fault in it is raised as its error.  A call that the limit
    cut is left out; one that is damaged otherwise is ProxyError cut, never a call of something
    else."""
    blocks, start, parts, finish = [], None, {}, None
    for delta in deltas:
        kind = type(delta)
        if kind is Piece or kind is Run:
            parts.setdefault(delta.kind, []).append(delta.text)
        elif kind is BlockStart:
            start, parts = delta, {}
        elif kind is BlockEnd:
            blocks.append(_whole_block(start, parts))
        elif kind is Finish:
            finish = delta
        elif kind is Fault:
            raise delta.error
    if finish is None:
        raise ProxyError("cut", "the answer has no finish")
    if None in blocks and finish.stop is not Stop.LENGTH:
        raise ProxyError("cut", "the upstream's answer is damaged: a call's arguments are no JSON")
    return Reply(tuple(b for b in blocks if b is not None), finish)


def deltas_of(reply: Reply) -> list:
    """The stream of a whole answer: the inverse of `collect`."""
    out: list = [Begin(reply.finish.usage)]
    for index, block in enumerate(reply.blocks):
        if isinstance(block, (Opaque, Found)):
            is_found = isinstance(block, Found)
            out.append(BlockStart(index, Kind.FOUND if is_found else Kind.OPAQUE,
                                  block=block if is_found else block.block))
        elif isinstance(block, (ToolCall, ServerCall)):
            kind = Kind.CALL if isinstance(block, ToolCall) else Kind.SERVER_CALL
            out += [BlockStart(index, kind, block.id, block.name),
                    Piece(index, Kind.ARGUMENTS, json_encode(block.arguments))]
        else:
            kind = Kind.TEXT if isinstance(block, Text) else Kind.THINKING
            out += [BlockStart(index, kind), Piece(index, kind, block.text)]
            if isinstance(block, Thinking):
                out.append(Piece(index, Kind.SIGNATURE, block.signature))
            out += [Piece(index, Kind.CITATION, json_encode(c))
                    for c in getattr(block, "citations", ())]
        out.append(BlockEnd(index))
    return [*out, reply.finish]


# ── 8. Bridges ────────────────────────────────────────────────────────────
# What no two upstreams agree on: tool schemas, tool names and ids, thinking
# signatures, the order of a conversation.  Pure functions; the sources of the
# rules are Google's and Anthropic's refusals, quoted where they bite.

# Tool schemas.  Cloud Code takes a small core of JSON Schema for every model; what is dropped is
# told in the description.  Keywords count only where a schema stands: a property may be *named*
# `type`, `format` or `$ref` and is data.

SCHEMA_MAX_DEPTH = 15       # deeper: "maximum schema depth exceeded"
SCHEMA_MAX_REFS = 10
SCHEMA_MAX_NODES = 4000
PLACEHOLDER = "_placeholder"    # Claude in VALIDATED mode refuses an empty object schema
_TYPES = ("object", "array", "string", "number", "integer", "boolean")
_HINTED = ("minLength", "maxLength", "pattern", "minimum", "maximum", "exclusiveMinimum",
           "exclusiveMaximum", "multipleOf", "minItems", "maxItems", "uniqueItems",
           "minProperties", "maxProperties", "format", "default")


class _Cleaning:
    """One schema being cleaned.  `left` bounds its size: references can multiply without end."""

    def __init__(self, root: dict, is_claude: bool):
        self.root, self.is_claude, self.left = root, is_claude, SCHEMA_MAX_NODES


def _pointer(root: Any, ref: str) -> Any:
    """The value a `#/a/b` pointer names, None when there is none."""
    if ref == "#":
        return root
    if not ref.startswith("#/"):
        return None
    for word in ref[2:].split("/"):
        word = urllib.parse.unquote(word).replace("~1", "/").replace("~0", "~")
        if isinstance(root, dict):
            root = root.get(word)
        elif isinstance(root, list) and re.fullmatch(r"[0-9]{1,6}", word) and int(word) < len(root):
            root = root[int(word)]
        else:
            return None
    return root


def _inline_ref(node: dict, root: dict, refs: tuple) -> tuple[dict, tuple]:
    """`node` with its $ref put in its place; siblings win.  Cycles end in a plain object."""
    while isinstance(node.get("$ref"), str):
        ref = node["$ref"]
        siblings = {k: v for k, v in node.items() if k != "$ref"}
        target = _pointer(root, ref)
        if ref in refs or len(refs) >= SCHEMA_MAX_REFS or not isinstance(target, dict):
            hint = "See: " + ref.rsplit("/", 1)[-1]
            return {"type": "object", "description": hint, **siblings}, refs
        node, refs = {**target, **siblings}, refs + (ref,)
    return node, refs


def _merge_all_of(node: dict, job: Any, refs: tuple) -> dict:
    """allOf folded in: properties and required united, the first type wins, descriptions joined.
    `job` has `root`, and `left`, which it takes from."""
    branches = node.get("allOf")
    if not isinstance(branches, list):
        return node
    merged = {k: v for k, v in node.items() if k != "allOf"}
    for branch in branches:
        job.left -= 1
        if not isinstance(branch, dict) or job.left < 0:
            continue
        branch, inner = _inline_ref(branch, job.root, refs)
        if len(inner) < SCHEMA_MAX_REFS:
            branch = _merge_all_of(branch, job, inner + ("allOf",))
        for word, value in branch.items():
            old = merged.get(word)
            if word == "properties" and isinstance(old, dict) and isinstance(value, dict):
                merged[word] = {**value, **old}
            elif word == "required" and isinstance(old, list) and isinstance(value, list):
                merged[word] = old + value
            elif word == "description" and isinstance(old, str) and isinstance(value, str):
                merged[word] = old + " " + value
            else:
                merged.setdefault(word, value)
    return merged


def _branch_worth(branch: dict) -> int:
    """Objects say most, then arrays, then scalars."""
    if branch.get("properties") or branch.get("type") == "object":
        return 3
    return 2 if branch.get("type") == "array" or "items" in branch else 1


def _enum_of(branches: list) -> list | None:
    """The values of alternatives that all are enums or constants, None where one is not."""
    rows = [b["enum"] if isinstance(b.get("enum"), list) else [b["const"]] if "const" in b else None
            for b in branches]
    return None if None in rows else [value for row in rows for value in row]


def _choose_branch(node: dict, root: dict, refs: tuple) -> tuple[dict, list[str], bool, tuple]:
    """anyOf and oneOf become their richest branch: (schema, hints, whether null was among them,
    the references followed)."""
    branches = [b for word in ("anyOf", "oneOf") if isinstance(node.get(word), list)
                for b in node[word] if isinstance(b, dict)]
    if not branches:
        return node, [], False, refs
    rest = {k: v for k, v in node.items() if k not in ("anyOf", "oneOf")}
    inlined = [_inline_ref(b, root, refs) for b in branches]
    nullable = any(b.get("type") == "null" for b, _ in inlined)
    # what only requires a property of its neighbours is no form of its own
    inlined = [pair for pair in inlined if pair[0].get("type") != "null"
               and pair[0].keys() - {"required", "description"}]
    real = [b for b, _ in inlined]
    if not real:
        return ({"type": "string", **rest} if nullable else rest), [], nullable, refs
    values = _enum_of(real)
    if values is not None:
        return {**rest, "enum": values}, [], nullable, refs
    best, refs = max(inlined, key=lambda pair: _branch_worth(pair[0]))
    names = list(dict.fromkeys(str(b.get("type", "object" if "properties" in b else "any"))
                               for b in real))
    hints = ["Accepts: " + ", ".join(names)] if len(names) > 1 else []
    chosen = {**best, **rest}
    if isinstance(best.get("properties"), dict) and isinstance(rest.get("properties"), dict):
        chosen["properties"] = {**best["properties"], **rest["properties"]}
    if "anyOf" in best or "oneOf" in best or "allOf" in best:
        chosen = {k: v for k, v in chosen.items() if k not in ("anyOf", "oneOf", "allOf")}
    return chosen, hints, nullable, refs


def enum_word(value: Any) -> str:
    """An enum value as the text Gemini wants: `only allowed for STRING type`."""
    return value if isinstance(value, str) else json_encode(value)


def _clean_type(node: dict) -> tuple[dict, list[str], bool]:
    """({"type", "enum"?}, hints, nullable) of a schema whose type may be missing or a list."""
    kinds, hints, nullable = node.get("type"), [], False
    if isinstance(kinds, list):
        nullable = "null" in kinds
        kinds = [k for k in kinds if k != "null"]
        if len(kinds) > 1:
            hints.append("Accepts: " + ", ".join(map(str, kinds)))
        kinds = kinds[0] if kinds else "string"
    if kinds == "null":
        kinds, nullable = "string", True
    kind = kinds.lower() if isinstance(kinds, str) else ""
    if kind not in _TYPES:
        kind = ("object" if isinstance(node.get("properties"), dict) else
                "array" if "items" in node or "prefixItems" in node else "string")
    values = [node["const"]] if "const" in node else node.get("enum")
    if isinstance(values, list) and kind not in ("object", "array"):
        nullable = nullable or None in values
        words = list(dict.fromkeys(enum_word(v) for v in values if v is not None and v != ""))
        if words:
            if 2 <= len(words) <= 10:
                hints.append("Allowed: " + ", ".join(words))
            return {"type": "string", "enum": words}, hints, nullable
    return {"type": kind}, hints, nullable


def _clean_properties(node: dict, out: dict, clean: Callable[[Any], dict], is_claude: bool,
                      hints: list[str]) -> None:
    properties = node.get("properties")
    cleaned = {}
    optional = set()
    for name, child in (properties.items() if isinstance(properties, dict) else ()):
        cleaned[name] = clean(child)
        if is_claude and cleaned[name].pop("nullable", False):
            optional.add(name)
    if cleaned:
        out["properties"] = cleaned
    required = node.get("required")
    if isinstance(required, list):
        names = list(dict.fromkeys(n for n in required if isinstance(n, str) and n in cleaned
                                   and n not in optional))
        if names:
            out["required"] = names
    extra = node.get("additionalProperties")
    if not cleaned and isinstance(extra, dict) and isinstance(extra.get("type"), str):
        hints.append(f"Map of names to {extra['type']}")


def _clean(node: Any, job: _Cleaning, depth: int, refs: tuple) -> dict:
    """One schema position; `refs` are the references being followed."""
    job.left -= 1
    if not isinstance(node, dict) or not node:
        return {"type": "string"}
    if depth > SCHEMA_MAX_DEPTH or job.left < 0:
        return {"type": "object"}
    node, refs = _inline_ref(node, job.root, refs)
    node = _merge_all_of(node, job, refs)
    node, hints, nullable, refs = _choose_branch(node, job.root, refs)
    out, type_hints, type_nullable = _clean_type(node)
    nullable = nullable or type_nullable or node.get("nullable") is True
    hints += type_hints
    if out["type"] == "object":
        _clean_properties(node, out, lambda child: _clean(child, job, depth + 1, refs),
                          job.is_claude, hints)
    elif out["type"] == "array":
        items = node.get("prefixItems", node.get("items"))
        if isinstance(items, list):
            hints.append("Tuple of: " + ", ".join(
                str(i.get("type", "any")) if isinstance(i, dict) else "any" for i in items))
            items = items[0] if items else None
        out["items"] = _clean(items, job, depth + 1, refs)
        out["items"].pop("nullable", None)
    limits = ", ".join(f"{word}: {json_encode(node[word])}" for word in _HINTED
                       if node.get(word) is not None)
    description = node.get("description")
    texts = [description] if isinstance(description, str) and description else []
    texts += hints + ([f"({limits[:200]})"] if limits else [])
    if texts:
        out["description"] = " ".join(texts)
    if nullable:
        out["nullable"] = True
    return out


def clean_answer_schema(schema: dict) -> dict:
    """The core-only form of a schema for an answer (`responseSchema`), of any type."""
    try:
        return _clean(schema, _Cleaning(schema, False), 0, ())
    except RecursionError as err:
        raise invalid("output_config.format.schema", "nested too deeply") from err


def _rooted(root: Any) -> dict:
    """A tool's schema; a bare map of properties, which some servers give, becomes one."""
    if not isinstance(root, dict):
        return {}
    words = {"properties", "$defs", "definitions"}
    if root and not words & root.keys() and all(isinstance(v, dict) for v in root.values()):
        return {"type": "object", "properties": root}
    return root


@functools.lru_cache(maxsize=2048)
def _clean_cached(schema_json: str, is_claude: bool) -> dict:
    root = _rooted(json.loads(schema_json))
    cleaned = _clean(root, _Cleaning(root, is_claude), 0, ())
    if cleaned.get("type") != "object":
        cleaned = {"type": "object", "properties": {}}
    cleaned.pop("nullable", None)
    if not cleaned.get("properties") and is_claude:
        cleaned["properties"] = {PLACEHOLDER: {"type": "boolean", "description": "Set to true."}}
        cleaned["required"] = [PLACEHOLDER]
    cleaned.setdefault("properties", {})
    return cleaned


def clean_schema(schema: Any, is_claude: bool) -> dict:
    """The core-only object schema for `functionDeclarations.parameters`.  Cached by content; the
    answer is shared and must not be changed."""
    try:
        return _clean_cached(json_encode(schema), is_claude)
    except RecursionError as err:
        raise invalid("tools", "a schema is nested too deeply") from err


def core_schema(schema: Mapping) -> dict:
    """A cleaned schema reduced to types, names and texts: for a service that refused it."""
    out: dict = {"type": schema.get("type", "string")}
    if schema.get("description"):
        out["description"] = schema["description"]
    if "properties" in schema:
        out["properties"] = {name: core_schema(row) for name, row in schema["properties"].items()}
        if schema.get("required"):
            out["required"] = schema["required"]
    if "items" in schema:
        out["items"] = core_schema(schema["items"])
    return out


def bare_schema(schema: Mapping) -> dict:
    return {"type": "object"}


def parameter_line(schema: Mapping) -> str:
    """A cleaned schema's parameters in words, for models that overlook the schema."""
    required = schema.get("required", ())
    return "Parameters: " + ", ".join(
        f"{name} ({row['type']}{', required' if name in required else ''})"
        for name, row in schema["properties"].items() if name != PLACEHOLDER)


_PYTHON_TYPES = {"object": dict, "array": list, "string": str, "number": (int, float),
                 "integer": int, "boolean": bool, "null": type(None)}


def _has_type(value: Any, kinds: Iterable[str]) -> bool:
    return any(isinstance(value, _PYTHON_TYPES.get(kind, object))
               and isinstance(value, bool) <= (kind not in ("number", "integer"))
               for kind in kinds)


def _types_of(schema: Mapping) -> list[str]:
    """The types a schema allows; [] allows any."""
    kinds = schema.get("type")
    if kinds is None and isinstance(schema.get("properties"), dict):
        kinds = "object"
    kinds = [kinds] if isinstance(kinds, str) else kinds if isinstance(kinds, list) else []
    return [k for k in kinds if isinstance(k, str) and k in _PYTHON_TYPES]


def _as_type(value: Any, kinds: list[str]) -> Any:
    """A value of another type brought to one of `kinds` where nothing is lost; else itself."""
    if isinstance(value, str) and "string" not in kinds:
        with contextlib.suppress(ValueError, RecursionError):       # no JSON: as it is
            parsed = json.loads(value, parse_float=finite, parse_constant=refuse_constant)
            if _has_type(parsed, kinds):
                return parsed
    if isinstance(value, float) and value.is_integer() and "integer" in kinds:
        return int(value)
    if kinds == ["string"] and isinstance(value, (int, float)):
        return json_encode(value)
    if kinds == ["array"] and not isinstance(value, (list, type(None))):
        return [value]
    return value


def _squashed(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _own_name(name: str, value: Mapping, schema: Mapping) -> str:
    """The declared name that a model meant by another spelling, where only one can be meant."""
    properties, extra = schema["properties"], schema.get("additionalProperties")
    if name in properties or extra is True or isinstance(extra, dict) or (
            "patternProperties" in schema or not _squashed(name)):
        return name
    meant = [n for n in properties if n not in value and _squashed(n) == _squashed(name)]
    spellings = [n for n in value if _squashed(n) == _squashed(name)]
    return meant[0] if len(meant) == len(spellings) == 1 else name


class _Restoring:
    """A call's arguments on their way back to the tool's own schema; `left` bounds the work."""

    def __init__(self, root: dict):
        self.root, self.left = root, 20_000

    def resolved(self, schema: Any) -> dict:
        """The schema with references and allOf in their places; {} where nothing is known."""
        schema = schema if isinstance(schema, dict) else {}
        for _ in range(SCHEMA_MAX_REFS):
            if not isinstance(schema.get("$ref"), str):
                self.left -= 1
                return _merge_all_of(schema, self, ())
            siblings = {k: v for k, v in schema.items() if k != "$ref"}
            schema = {**object_of(_pointer(self.root, schema["$ref"])), **siblings}
        return {}

    @staticmethod
    def alternatives(schema: Mapping) -> list:
        return [{} if b is True else b for word in ("anyOf", "oneOf")
                if isinstance(schema.get(word), list)
                for b in schema[word] if b is True or isinstance(b, dict)]

    def fits(self, value: Any, schema: Any, depth: int = 0) -> bool:
        """Whether the value is valid, as far as types, enums, names and items tell."""
        schema = self.resolved(schema)
        if depth > 6 or self.left < 0:
            return True
        kinds, word = _types_of(schema), enum_word(value)
        values = [schema["const"]] if "const" in schema else schema.get("enum")
        if kinds and not _has_type(value, kinds) or isinstance(values, list) and not any(
                type(v) is type(value) and enum_word(v) == word for v in values):
            return False
        if isinstance(value, dict):
            required, properties = schema.get("required"), object_of(schema.get("properties"))
            if isinstance(required, list) and any(n not in value for n in required
                                                  if isinstance(n, str)):
                return False
            if not all(self.fits(value[n], row, depth + 1) for n, row in properties.items()
                       if n in value):
                return False
        if isinstance(value, list) and isinstance(schema.get("items"), dict) and not all(
                self.fits(item, schema["items"], depth + 1) for item in value[:50]):
            return False
        branches = self.alternatives(schema)
        return not branches or any(self.fits(value, b, depth + 1) for b in branches)

    def branch(self, value: Any, schema: dict) -> dict:
        """The schema that counts for a value: of alternatives the first it is valid for, else the
        one that it is nearest to."""
        for _ in range(3):
            schema = self.resolved(schema)
            branches = self.alternatives(schema)
            if not branches:
                break
            rest = {k: v for k, v in schema.items() if k not in ("anyOf", "oneOf")}
            chosen = next((b for b in branches if self.fits(value, b)), None)
            if chosen is None:
                chosen = self.nearest(value, [self.resolved(b) for b in branches])
            chosen = self.resolved(chosen)
            both = {**object_of(chosen.get("properties")), **object_of(rest.get("properties"))}
            schema = {**chosen, **rest, **({"properties": both} if both else {})}
        return schema

    def nearest(self, value: Any, branches: list) -> dict:
        real = [b for b in branches if b.get("type") != "null"]
        values = _enum_of(real)
        if values is not None:
            return {"enum": values}

        def distance(branch: dict) -> tuple:
            kinds, rows = _types_of(branch), object_of(branch.get("properties"))
            known = value.keys() & rows.keys() if isinstance(value, dict) else ()
            return (bool(kinds) and not _has_type(value, kinds),
                    -sum(self.fits(value[n], rows[n]) for n in known), -len(known))
        return min(real, key=distance, default={})

    def restore(self, value: Any, schema: Any, is_top: bool = False) -> Any:
        if not isinstance(schema, dict) or self.left < 0:
            return value
        schema = self.branch(value, schema)
        kinds = _types_of(schema)
        if "type" in schema and not is_top and kinds and not _has_type(value, kinds):
            value = _as_type(value, kinds)
        if isinstance(value, dict):
            return self._members(value, schema)
        if isinstance(value, list):
            items, rows = schema.get("items"), schema.get("prefixItems")
            rows = rows if isinstance(rows, list) else items if isinstance(items, list) else []
            return [self.restore(item, rows[i] if i < len(rows) else items)
                    for i, item in enumerate(value)]
        values = [schema["const"]] if "const" in schema else schema.get("enum")
        if isinstance(value, str) and isinstance(values, list) and value not in values:
            exact = [v for v in values if enum_word(v) == value]
            near = [v for v in values if enum_word(v).lower() == value.lower()]
            return (exact or (near if len(near) == 1 else []) or [value])[0]
        return value

    def _members(self, value: dict, schema: dict) -> dict:
        properties, required = object_of(schema.get("properties")), schema.get("required")
        out = {}
        for name, item in value.items():
            if name == PLACEHOLDER and name not in properties:
                continue
            own = _own_name(name, value, schema) if properties else name
            if own != name and not self.fits(self.restore(item, properties[own]), properties[own]):
                own = name
            kinds = _types_of(self.resolved(properties.get(own)))
            if item is None and kinds and "null" not in kinds and isinstance(required, list) and (
                    own not in required):
                continue
            out[own] = self.restore(item, properties.get(own))
        return out


def restore_arguments(arguments: dict, schema: Any) -> dict:
    """A call's arguments brought back to the client's own schema: enum texts to their numbers or
    booleans, our placeholder removed, and what models get wrong mended where the schema leaves no
    doubt: a number or list in quotes, a bare item for a list, `filePath` for `file_path`, null for
    what is merely optional.  What is valid already stays as it is."""
    root = _rooted(schema)
    return _Restoring(root).restore(arguments, root, True)


# Tool names and ids

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}\Z")
_ID = re.compile(r"[a-zA-Z0-9_-]+\Z")


def tool_name(name: str) -> str:
    """A name every upstream takes (Gemini: at most 64, Claude: no dots); stable, collision-safe."""
    if _NAME.match(name):
        return name
    safe = re.sub(r"[^A-Za-z0-9_-]", "_", name)
    safe = safe if safe[:1].isalpha() or safe[:1] == "_" else "_" + safe
    return safe[:55] + "_" + hashlib.sha256(name.encode()).hexdigest()[:8]


def call_reference(call_id: str) -> str:
    """A call id OpenAI takes: any signs (Kimi's must stay as they are), 64 at most."""
    if len(call_id) <= 64:
        return call_id
    return call_id[:48] + hashlib.sha256(call_id.encode("utf-8", "replace")).hexdigest()[:16]


def tool_id(call_id: str) -> str:
    """A call id Claude takes."""
    if _ID.match(call_id):
        return call_id
    digest = hashlib.sha256(call_id.encode("utf-8", "replace")).hexdigest()[:4]
    return re.sub(r"[^a-zA-Z0-9_-]", "_", call_id) + digest


# Thinking signatures travel to the client inside `agp1.<family><kind><tag>.<raw>`: family g, c, o
# (Chat) or r (Responses), kind t (of this block's text) or f (of the next tool call), tag of the
# provider.  They go back only to the family and provider that minted them, never changed.

_ENVELOPE = re.compile(r"agp1\.([gcor])([tf])([a-z0-9]*)\.(.+)\Z", re.S)


class Signature(NamedTuple):
    family: str
    kind: str
    tag: str
    raw: str


def wrap_signature(family: str, kind: str, tag: str, raw: str) -> str:
    return f"agp1.{family}{kind}{tag}.{raw}"


def unwrap_signature(text: str) -> Signature | None:
    match = _ENVELOPE.match(text)
    return Signature(*match.groups()) if match else None


# Conversation repair.  Each function mends one thing that upstreams refuse and counts it in
# `mended`; all look at most one turn ahead, so the same prefix of a conversation always gives the
# same bytes (prompt caches).

class Mended(collections.Counter):
    """What was mended -> how many times, as `why` shows it."""

    def __init__(self, *given: Any):
        if given:       # one is made for each request, and Counter's own takes 1 us
            super().__init__(*given)


NO_RESULT = Text("no result was recorded for this call")
NO_CALL = Text("[result of an earlier tool call]")


def reminder(text: str) -> str:
    """A note of the system inside a user turn, as Claude Code writes them."""
    return f"<system-reminder>\n{text}\n</system-reminder>"


def fold_system_turns(turns: Iterable[Turn], mended: Mended,
                      note: Callable[[str], Text]) -> tuple[list[str], list[Turn]]:
    """Mid-conversation system turns become notes in the user turn they follow, or else in the next
    one; those before any user turn go to the system texts.  No Gemini upstream has a system role in
    `contents`, and an earlier turn is never changed (prompt caches)."""
    system: list[str] = []
    waiting: list[Text] = []
    out: list[Turn] = []
    has_user = False
    for turn in turns:
        if turn.role != "system":
            out.append(turn)
            has_user = has_user or turn.role == "user"
            if turn.role == "user" and waiting:
                out.append(Turn("user", tuple(waiting)))
                waiting = []
            continue
        text = "\n".join(b.text for b in turn.blocks if isinstance(b, Text))
        if not text.strip():
            continue
        mended["system turns folded into user turns"] += 1
        if not has_user:
            system.append(text)
        elif out[-1].role == "assistant":
            waiting.append(note(text))
        else:
            out.append(Turn("user", (note(text),)))
    if waiting:
        out.append(Turn("user", tuple(waiting)))
    return system, out


def is_blank(block: Any) -> bool:
    return isinstance(block, Text) and block.text.strip() in ("", "(no content)")


def _joined(turns: list[Turn]) -> list[Turn]:
    """Neighbours of one role made one turn; the others are the same objects."""
    if all(a.role != b.role for a, b in zip(turns, turns[1:])):
        return turns
    groups = [list(group) for _, group in itertools.groupby(turns, lambda turn: turn.role)]
    return [group[0] if len(group) == 1 else
            Turn(group[0].role, tuple(b for turn in group for b in turn.blocks))
            for group in groups]


def merge_turns(turns: Iterable[Turn], mended: Mended) -> list[Turn]:
    """Blank texts and empty assistant turns dropped, neighbours of one role joined: Claude refuses
    both.  An emptied user turn keeps a dot, so that the order of roles stays."""
    rows = []
    for turn in turns:
        if any(map(is_blank, turn.blocks)):
            blocks = tuple(b for b in turn.blocks if not is_blank(b))
            mended["blank texts left out"] += len(turn.blocks) - len(blocks)
            turn = Turn(turn.role, blocks)
        rows.append(turn)
    whole = _joined(rows)       # first: in Responses a thought is an item of its own
    # a thought without words or deeds leaves nothing to answer
    kept = [turn for turn in whole if turn.role != "assistant"
            or not all(isinstance(b, Thinking) for b in turn.blocks)]
    out = _joined(kept)
    mended["empty turns left out"] += len(whole) - len(kept)
    mended["turns of one role joined"] += len(rows) - len(whole) + len(kept) - len(out)
    return [turn if turn.blocks else Turn(turn.role, (Text("."),)) for turn in out]


def number_repeated_ids(turns: list[Turn], mended: Mended) -> list[Turn]:
    """Calls that reuse an earlier id get a number, and so do the results that follow them: some
    clients count ids anew in every turn, and a result must not answer two calls."""
    given = [b.id for turn in turns for b in turn.blocks if isinstance(b, ToolCall)]
    taken, seen = set(given), set()
    if len(taken) == len(given):
        return turns
    newest: dict[str, collections.deque] = {}   # id -> what it stands for in the latest turn
    counts: dict[str, int] = {}         # id -> the last number it got
    out = []
    for turn in turns:
        blocks, called = [], set()
        for block in turn.blocks:
            if isinstance(block, ToolCall):
                own = block.id
                if block.id in seen:
                    number = next(n for n in itertools.count(counts.get(own, 1) + 1)
                                  if f"{own}_{n}" not in taken)
                    own, counts[block.id] = f"{own}_{number}", number
                    mended["repeated call ids numbered"] += 1
                if block.id not in called:
                    newest[block.id] = collections.deque()
                newest[block.id].append(own)
                called.add(block.id)
                seen.add(own)
                taken.add(own)
                block = replace(block, id=own) if own != block.id else block
            elif isinstance(block, ToolResult) and newest.get(block.call_id):
                stands_for = newest[block.call_id]
                own = stands_for.popleft() if len(stands_for) > 1 else stands_for[0]
                block = replace(block, call_id=own) if own != block.call_id else block
            blocks.append(block)
        out.append(Turn(turn.role, tuple(blocks)))
    return out


def find_results(turns: list[Turn], mended: Mended) -> dict[str, ToolResult]:
    """The result of each call id; the last of two wins, and one before its call is none."""
    called: dict[str, int] = {}
    results: dict[str, ToolResult] = {}
    for at, turn in enumerate(turns):
        for block in turn.blocks:
            if isinstance(block, ToolCall):
                called.setdefault(block.id, at)
            elif isinstance(block, ToolResult) and called.get(block.call_id, at) < at:
                mended["second results of a call left out"] += block.call_id in results
                mended["late results moved up"] += called[block.call_id] + 1 < at
                results[block.call_id] = block
    return results


GO_ON = "Continue exactly after: "


def pair_tool_results(turns: list[Turn], mended: Mended) -> list[Turn]:
    """Every call answered in the turn right after it, in the order of the calls; a missing result
    says so, one without its call becomes text."""
    results = find_results(turns, mended)

    def answers_of(calls: list[str]) -> tuple:
        mended["missing results filled in"] += sum(i not in results for i in calls)
        return tuple(results.get(i) or ToolResult(i, (NO_RESULT,), True) for i in calls)
    out: list[Turn] = []
    waiting: list[str] = []
    for turn in turns:
        if turn.role == "assistant":
            out.append(turn)
            waiting = list(dict.fromkeys(b.id for b in turn.blocks if isinstance(b, ToolCall)))
            continue
        answers = answers_of(waiting)
        given = [b.call_id for b in turn.blocks if isinstance(b, ToolResult)]
        mended["results put in the order of their calls"] += (
            given != waiting and sorted(given) == sorted(waiting))
        waiting, others = [], []
        for block in turn.blocks:
            if not isinstance(block, ToolResult):
                others.append(block)
            elif block.call_id not in results:
                mended["results without a call told as text"] += 1
                others.append(NO_CALL)
                others.extend(block.blocks)
        if answers or others:
            blocks = answers + tuple(others)
            is_same = len(blocks) == len(turn.blocks) and all(
                new is old for new, old in zip(blocks, turn.blocks))
            out.append(turn if is_same else Turn("user", blocks))
    if waiting:
        out.append(Turn("user", answers_of(waiting)))
    return out


def close_ends(turns: list[Turn], mended: Mended) -> list[Turn]:
    """A conversation that begins and ends with the user: Claude allows no prefill."""
    turns = turns or [Turn("user", (Text("."),))]
    if turns and turns[0].role == "assistant":
        turns = [Turn("user", (Text("."),))] + turns
        mended["beginning by the model preceded by a dot"] += 1
    if turns and turns[-1].role == "assistant":
        tail = turns[-1].blocks[-1] if turns[-1].blocks else None
        prefill = tail.text.rstrip() if isinstance(tail, Text) else ""
        order = GO_ON + prefill if 0 < len(prefill) <= 64 else "Continue."
        turns = turns + [Turn("user", (Text(order),))]
        mended["end by the model followed by an order to go on"] += 1
    return turns


def told_reminder(text: str) -> Text:
    return Text(reminder(text))


def _outline(turn: Turn) -> tuple[bool, tuple, tuple]:
    """(whether it is sound by itself, ids of its calls, ids that its results answer)."""
    if turn.role == "user" and set(map(type, turn.blocks)) == {Text}:
        return not any(map(is_blank, turn.blocks)), (), ()
    calls = tuple(b.id for b in turn.blocks if isinstance(b, ToolCall))
    results = tuple(b.call_id for b in turn.blocks if isinstance(b, ToolResult))
    if turn.role == "user":
        is_fit = not calls and all(isinstance(b, ToolResult)
                                   for b in turn.blocks[:len(results)])
    else:
        is_fit = not results and turn.role == "assistant" and not all(
            isinstance(b, Thinking) for b in turn.blocks)
    return bool(is_fit and turn.blocks and not any(map(is_blank, turn.blocks))), calls, results


def is_sound(turns: Iterable[Turn]) -> bool:
    """Whether there is nothing to repair: 15 us for 80 turns that were seen before, and the repairs
    take 500."""
    waiting: tuple = ()
    role, called = "assistant", []
    for turn in turns:
        kept = turn.kept
        outline = kept.get("outline") if kept is not None else None
        if outline is None:
            outline = _outline(turn)
            if kept is not None:
                kept["outline"] = outline
        if not outline[0] or turn.role == role or outline[2] != waiting:
            return False
        role, waiting = turn.role, outline[1]
        called += waiting
    return role == "user" and len(called) == len(set(called))


def repair_turns(turns: Iterable[Turn], mended: Mended | None = None,
                 note: Callable[[str], Text] = told_reminder) -> tuple[list[str], list[Turn]]:
    """All repairs in their order: (texts for the system instruction, alternating turns).  `note`
    makes what stands in a user turn for a system turn."""
    mended = Mended() if mended is None else mended
    if is_sound(turns):
        return [], list(turns)
    system, folded = fold_system_turns(turns, mended, note)
    numbered = number_repeated_ids(folded, mended)
    paired = pair_tool_results(merge_turns(numbered, mended), mended)
    return system, close_ends(merge_turns(paired, Mended()), mended)


def without(value: Any, path: list[str]) -> Any:
    """`value` without the member a path names; `*` goes through every item of a list.  Words that
    name no member are kinds of blocks, which Anthropic tells in between."""
    if isinstance(value, list) and (path[0] == "*" or path[0].isdecimal()):
        return [without(item, path[1:]) if len(path) > 1 and path[0] in ("*", str(i)) else item
                for i, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    if path[0] not in value or len(path) > 1 and not isinstance(value[path[0]], (dict, list)):
        return without(value, path[1:]) if len(path) > 1 else value
    rest = {k: v for k, v in value.items() if k != path[0]}
    if len(path) == 1:
        return rest
    inner = without(value[path[0]], path[1:])
    return rest if inner == {} else {**value, path[0]: inner}


def drop_old_media(turns: list[Turn]) -> list[Turn]:
    """Images and documents before the last two user turns replaced by a word about them."""
    users = [at for at, turn in enumerate(turns) if turn.role == "user"]
    since = users[-2] if len(users) > 1 else 0

    def without(blocks: tuple) -> tuple:
        return tuple(Text(f"[{b.media_type} left out]") if isinstance(b, Media) else
                     replace(b, blocks=without(b.blocks)) if isinstance(b, ToolResult) else b
                     for b in blocks)
    return [turn if at >= since else Turn(turn.role, without(turn.blocks))
            for at, turn in enumerate(turns)]


def thought_signature(block: Thinking, signatures: Mapping, family: str,
                      tag: str) -> Signature | None:
    """The signature of a thought that the service of this family and tag made: the one it carries,
    else, where its client stripped it, the one that is remembered for its text."""
    signature = unwrap_signature(block.signature)
    if signature is None and not block.signature and block.text:
        known = signatures.get(content_key("text", block.text))
        signature = Signature(known[0], "t", known[1], known[2]) if known else None
    return signature if signature and (signature.family, signature.tag) == (family, tag) else None


def has_unsigned_open_loop(turns: list[Turn], signatures: Mapping, family: str, tag: str) -> bool:
    """Whether a model turn of the open tool loop lacks a thought that its service signed: Claude
    takes such a loop without thinking only."""
    if not turns or not any(isinstance(b, ToolResult) for b in turns[-1].blocks):
        return False
    for turn in reversed(turns[:-1]):
        if turn.role != "assistant":
            if not any(isinstance(b, ToolResult) for b in turn.blocks):
                return False
            continue
        made = (thought_signature(b, signatures, family, tag) for b in turn.blocks
                if isinstance(b, Thinking))
        if not any(s and s.kind == "t" and signatures.get(content_key("bad", s.raw)) is None
                   for s in made):
            return True
    return False


def schema_order(schema: Mapping) -> str:
    """The wish for JSON in words, for models that take it in no other way."""
    if schema == ANY_OBJECT:
        return "Answer with one JSON object and nothing else."
    return "Answer with one JSON value of this schema and nothing else: " + json_encode(schema)


def answer_shape(request: Request, turns: list[Turn], mended: Mended, family: str, tag: str,
                 signatures: Any) -> AnswerShape:
    """How the answer's names, ids and signatures are turned back for this client.  `turns` are
    those that were sent, `family` and `tag` tell whose signatures come."""
    # no more than that: what is kept of a tool must not live as long as the answer
    tools = {tool_name(tool.name): (tool.name, tool.schema) for tool in request.tools}

    def client_call(name: str, arguments: dict) -> tuple[str, dict]:
        if name.startswith(("default_api:", "default_api.")):
            name = name[len("default_api:"):]
        known = tools.get(name)
        if known is None:
            return name, arguments
        restored = restore_arguments(arguments, known[1])
        mended["arguments brought to their tool's schema"] += restored != arguments and (
            arguments.keys() != {PLACEHOLDER})
        return known[0], restored

    def remember(key: str, raw: str) -> None:
        signatures[key] = (family, tag, raw)

    def remember_text(text: str, raw: str) -> None:
        key = content_key("text", text)
        if signatures.get(key) is None:     # the same words keep their first signature
            remember(key, raw)
    last = turns[-1].blocks[-1]
    order = last.text if isinstance(last, Text) else ""
    prefill = order[len(GO_ON):] if order.startswith(GO_ON) and request.turns and (
        request.turns[-1].role == "assistant") else ""
    pick_json = None
    if request.json_schema is not None and not prefill:
        kind = request.json_schema.get("type")
        pick_json = functools.partial(first_json, kind=kind if isinstance(kind, str) else "object",
                                      in_prose=not request.tools)
    return AnswerShape(
        shows_thinking=request.thinking.is_shown, thinking_text=request.thinking.shows_text,
        signs_calls=request.dialect == "gemini",
        one_call=request.one_call, remember=remember, client_call=client_call,
        remember_text=remember_text, prefill=prefill, pick_json=pick_json,
        wrap_signature=lambda raw, kind: wrap_signature(family, kind, tag, raw),
        used_ids=frozenset(b.id for t in request.turns for b in t.blocks
                           if isinstance(b, ToolCall)))


# Relaying to an upstream of the client's own language

def event_data(event: str) -> str:
    """The data of an event's text."""
    return "\n".join(line[5:].lstrip(" ") for line in event.split("\n") if line[:5] == "data:")


@functools.lru_cache(maxsize=4)
def _text_member(name: str) -> Any:
    """A pattern of a member of JSON whose value is a text."""
    return re.compile(rf'"{name}"\s*:\s*"(?:[^"\\]|\\.)*"')


# Plain events: a piece of text or of a thought, and nothing else that means anything

COUNT = "(?:0|[1-9][0-9]{0,8})"     # as usage of plain events tells it
_COUNTED = re.compile("(?<=[: ])[1-9][0-9]*")


@functools.lru_cache(maxsize=16)
def _spaced(pattern: str) -> Any:
    """A pattern of JSON written without spaces, for JSON with and without.  Compiled when the first
    stream comes."""
    return re.compile(pattern.replace('":', '": ?').replace(',"', ', ?"'))


@functools.lru_cache(maxsize=64)
def _bodies_seen(form: str, head: str) -> list[tuple]:
    """One item: (kind, pattern) of the bodies that events of a form, of any stream, had behind a
    head; the newest first, four at most.  Text and counts are no part of a pattern."""
    return [()]


@functools.lru_cache(maxsize=64)
def _body_pattern(before: str, usage: str, after: str) -> Any:
    """A pattern of a body like one that was seen, other text and other counts apart: (text, usage).
    Letter by letter is fast, a choice is not: 0.5 us an event against 1.6."""
    counts = "[1-9][0-9]{0,8}".join(map(re.escape, usage.split("\0")))
    return re.compile(f"({PLAIN_TEXT}){re.escape(before)}({counts}){re.escape(after)}")


class PlainEvents:
    """Tells the plain events of one stream.  `form` is their pattern, strict JSON; its groups are
    `text`, `usage` where there is one, `thinks` in a thought, and `rest`: what is the same in all
    of them.  Who looks like the last one needs no second look, the others are parsed."""
    form = ""
    opens = True        # whether one may begin a block: nobody else has to see it

    def __init__(self) -> None:
        self._form = _spaced(self.form)
        self._kind, self._head, self._at, self.rest = Kind.TEXT, "\0", 0, ""
        self._body, self._seen = _body_pattern("", "", ""), [()]

    def __call__(self, event: str) -> tuple[Kind, str, str] | None:
        """(TEXT or THINKING, its text as JSON has it, usage as JSON has it) of a plain event."""
        match = None
        if event.startswith(self._head):
            match = self._body.match(event, self._at)
            if match is not None and event[match.end():] == self.rest:
                return self._kind, match[1], match[2]
            match = self._seen_before(event)    # of another kind, or with a count that was 0
        match = match or self._look(event)
        return match and (self._kind, match[1], match[2])

    def _seen_before(self, event: str) -> Any:
        """The match of a body that an event had behind the same head, of any stream: 1 us against 6
        for a look, twice in an answer."""
        for kind, body in self._seen[0]:
            match = body.match(event, self._at)
            if match is not None and event[match.end():] == self.rest:
                self._kind, self._body = kind, body
                return match
        return None

    def _look(self, event: str) -> Any:
        """The match of an event that differs from the last one in more than text and counts."""
        whole = self._form.fullmatch(event)
        if whole is None:
            return None
        (self._at, begin), rest = whole.span("text"), whole.start("rest")
        self._head, self.rest = event[:self._at], event[rest:]
        self._seen = _bodies_seen(self.form, self._head)
        match = self._seen_before(event)
        if match is not None:
            return match
        told, end = whole.span("usage") if whole["usage"] else (rest, rest)
        self._kind = Kind.TEXT if whole["thinks"] is None else Kind.THINKING
        self._body = _body_pattern(event[begin:told], _COUNTED.sub("\0", event[told:end]),
                                   event[end:rest])
        self._seen[0] = ((self._kind, self._body), *self._seen[0][:3])
        return self._body.match(event, self._at)

    def counts(self, usages: list[str]) -> dict[str, int]:
        """The METER that usages of plain events come to, one after the other."""
        return {}

    def is_whole(self, counts: Mapping[str, int]) -> bool:
        """Whether a later METER leaves nothing of theirs as it was."""
        return False


class EventRelay:
    """Events of an upstream on their way to a client of the same language, as they came: only the
    model is put back to the client's name.  Usage, content and finish are read on the way.  A
    dialect's own has `feed(event)` and `read_whole(value)`."""
    member = "model"        # where an answer names its model
    last_word = ""          # of a stream that lacks its own

    def __init__(self, state: Any):
        self.state, self.counts = state, {}
        self.has_content = self.has_finish = self.is_over = False
        self._named = f'"{self.member}":{quote(state.model)}'

    def renamed(self, text: str) -> str:
        """The first member of that name is the event's own, as Chat orders them: in strings its
        quotes are escaped."""
        return _text_member(self.member).sub(lambda _: self._named, text, 1)

    def usage(self) -> Usage:
        get = self.counts.get
        cached, written = get("cached", 0), get("written", 0)
        output = max(get("output", 0), get("visible", 0) + get("thinking", 0))
        return Usage(max(0, get("input", 0) - cached - written), cached, output,
                     get("thinking", 0), written, get("searches", 0))

    def read_whole(self, value: dict) -> None:
        """Reads usage; raises UpstreamFault for what is no answer."""
        raise NotImplementedError

    def whole(self, raw: bytes) -> bytes:
        """A whole answer, the model put back; raises ValueError or UpstreamFault."""
        value = json_decode(raw)
        if not isinstance(value, dict):
            raise UpstreamFault(value)
        self.read_whole(value)
        if value.get(self.member) in (None, self.state.model):
            return raw
        named = {self.member: quote(self.state.model)}
        return json_splice(raw.decode("utf-8"), named).encode("utf-8")

    def end(self) -> str:
        """What is missing at the upstream's end, or ProxyError where the answer is cut."""
        if not (self.has_finish or self.is_over and self.has_content):
            raise ProxyError("cut" if self.has_content else "empty",
                             "the upstream ended its answer without a finish")
        return "" if self.is_over else self.last_word


# ── 9. Anthropic dialect ──────────────────────────────────────────────────
# The Messages API as clients see it (docs.anthropic.com, and Claude Code
# 2.1.197 and later on the wire).  A stream is
#
#     message_start (content_block_start content_block_delta* content_block_stop)*
#     message_delta message_stop          `ping` anywhere; `error` ends it at any point
#
# [A1] The `event:` line is mandatory: without it Claude Code repeats the call unstreamed.
# [A2] Tool arguments count only as input_json_delta; `input` in the start stays {}.
# [A3] A signature_delta comes once, last in its block.
# [A4] No thinking block after the last text: `claude -p` would print nothing.
# [A5] Claude Code 2.1.197 counts no ping as life, only content and message_delta.
# [A6] The usage of message_delta is cumulative and corrects that of message_start.
# [A7] `retry-after` above 60 makes Claude Code stop at once; up to 60 it waits.

_ROLES = ("user", "assistant", "system")
# Tools that Anthropic's API knows by type only; clients run them themselves.
CLIENT_TOOLS = {
    "bash_": {"command": "string", "restart": "boolean"},
    "text_editor_": {"command": "string", "path": "string", "file_text": "string",
                     "old_str": "string",
                     "new_str": "string", "insert_line": "integer", "insert_text": "string",
                     "view_range": "array"},
    "memory_": {"command": "string", "path": "string", "file_text": "string", "old_str": "string",
                "new_str": "string", "insert_line": "integer", "insert_text": "string",
                "old_path": "string", "new_path": "string", "view_range": "array"},
    "computer_": {"action": "string", "coordinate": "array", "text": "string",
                  "duration": "number",
                  "scroll_direction": "string", "scroll_amount": "integer"},
}


class _Reading:
    """One reading of messages: the table of block types, and what tools are mentioned."""

    def __init__(self, parsers: Mapping[str, Callable[[dict, str, _Reading], tuple]]):
        self.parsers = parsers
        self.mentioned: dict[str, None] = {}    # in order, for tools whose loading was deferred
        self.unread: dict[str, None] = {}       # types of blocks that nobody here knows
        self.removed: set = set()               # tools that were taken away and not used again
        self.steps: list[tuple[str, Any]] = []  # what was noted, in order

    def note(self, what: str, name: Any) -> None:
        """A tool that was mentioned, used or removed, or the type of an unread block."""
        self.steps.append((what, name))
        if what == "removed":
            self.mentioned.pop(name, None)
            self.removed.add(name)
        elif what == "unread":
            self.unread[name] = None
        else:
            self.mentioned.setdefault(name)
            if what == "used":
                self.removed.discard(name)

    def blocks(self, content: Any, path: str) -> tuple:
        """Neutral blocks of a `content`: a string, or a list of blocks."""
        if isinstance(content, str):
            return (Text(content),)
        out: list = []
        for position, block in enumerate(list_at(content, path)):
            where = f"{path}.{position}"
            if not isinstance(block, dict) or not isinstance(block.get("type"), str):
                raise invalid(where + ".type", "a string is required")
            parse = self.parsers.get(block["type"])
            if parse:
                out.extend(parse(block, where, self))
            else:
                self.note("unread", block["type"][:40])
        return tuple(out)


def _media(source: Any, path: str, reading: _Reading, title: str = "",
           kind_of_url: str = "image/*") -> tuple:
    """The block of an image or document source."""
    source = dict_at(source, path)
    kind = source.get("type")
    if kind == "text":
        text = text_at(source.get("data"), path + ".data")
        return (Text(f"{title}\n{text}" if title else text),)
    if kind == "content":
        content = source.get("content")
        return (Text(title),) * bool(title) + reading.blocks(content, path + ".content")
    if kind == "url":
        return (media_of_url(source.get("url"), kind_of_url, path + ".url", title),)
    if kind == "file":
        raise invalid(path, "a file that was uploaded elsewhere is not known here; send base64")
    if kind != "base64":
        raise invalid(path + ".type", "base64 is required")
    return (media_of_data(source.get("data"), source.get("media_type"), path + ".data", title),)


def _tool_result(block: dict, path: str, reading: _Reading) -> tuple:
    call_id = text_at(block.get("tool_use_id"), path + ".tool_use_id")
    content = block.get("content")
    if content is not None and not isinstance(content, (str, list)):
        raise invalid(path + ".content", "a string or a list of blocks is required")
    names = [b.get("tool_name") for b in content or () if isinstance(b, dict)
             and b.get("type") == "tool_reference"] if isinstance(content, list) else []
    blocks = reading.blocks(content, path + ".content") if content else ()
    if names:
        blocks += (Text("Loaded tools: " + ", ".join(map(str, names))),)
    return (ToolResult(call_id, blocks, block.get("is_error") is True),)


def _tool_use(block: dict, path: str, reading: _Reading) -> tuple:
    name = text_at(block.get("name"), path + ".name")
    arguments = block.get("input")
    if not isinstance(arguments, dict):
        raise invalid(path + ".input", "an object is required")
    if json_depth_exceeds(arguments):
        raise invalid(path + ".input", f"nested deeper than {MAX_JSON_DEPTH}")
    reading.note("used", name)
    return (ToolCall(text_at(block.get("id"), path + ".id"), name, arguments),)


def _reference(block: dict, path: str, reading: _Reading) -> tuple:
    name = block.get("tool_name") or block.get("name")
    if isinstance(name, str):
        reading.note("used", name)
    return ()


def _removal(block: dict, path: str, reading: _Reading) -> tuple:
    name = block.get("tool_name") or block.get("name")
    reading.note("removed", name)
    return ()


def _server_block(block: dict, path: str, reading: _Reading) -> tuple:
    """A server tool's call or result in the history, told in a few words."""
    content = block.get("content")
    links = [str(b.get("text") or f"{b.get('title', '')} {b.get('url', '')}")
             for b in objects_of(content)]
    for row in objects_of(object_of(content).get("tool_references")):
        reading.note("mentioned", str(row.get("tool_name")))
    told = "\n".join(links) if links else json_encode(block.get("input") or content or {})
    return (Text(f"[{block['type'].replace('_', ' ')}: {told}]"[:4096]),)


def _search_result(block: dict, path: str, reading: _Reading) -> tuple:
    texts = [b.text for b in reading.blocks(block.get("content") or [], path + ".content")
             if isinstance(b, Text)]
    return (Text("\n".join([str(block.get("title", "")), str(block.get("source", ""))] + texts)),)


# type of an input block -> function(block, path, reading) -> neutral blocks.  Types that are not
# here are left out and told; keys nobody reads (cache_control, citations, caller) are dropped.
ANTHROPIC_BLOCKS: dict[str, Callable[[dict, str, _Reading], tuple]] = {
    "text": lambda b, path, _: (Text(text_at(b.get("text"), path + ".text")),),
    "image": lambda b, path, reading: _media(b.get("source"), path + ".source", reading),
    "document": lambda b, path, reading: _media(b.get("source"), path + ".source", reading,
                                                str(b.get("title") or ""), "application/pdf"),
    "tool_use": _tool_use,
    "tool_result": _tool_result,
    "thinking": lambda b, path, _: (Thinking(
        text_at(b.get("thinking", ""), path + ".thinking"),
        text_at(b.get("signature") or "", path + ".signature")),),
    "redacted_thinking": lambda b, path, _: (),
    "search_result": _search_result,
    "tool_reference": _reference, "tool_addition": _reference, "tool_removal": _removal,
    "mid_conv_system": lambda b, path, reading: (Text(
        reminder("\n".join(t.text for t in reading.blocks(b.get("content") or "", path)
                           if isinstance(t, Text)))),),
    "compaction": lambda b, path, _: (Text(text_at(b.get("content") or "", path + ".content")),),
    **dict.fromkeys(("server_tool_use", "web_search_tool_result", "web_fetch_tool_result",
                     "code_execution_tool_result", "bash_code_execution_tool_result",
                     "text_editor_code_execution_tool_result", "mcp_tool_use", "mcp_tool_result",
                     "tool_search_tool_result"),
                    _server_block),
}


def _turn(message: Any, path: str, reading: _Reading,
          is_kept: bool) -> tuple[Turn, str | None]:
    """The turn of a message, and the effort that it carries, None for none."""
    message = dict_at(message, path)
    if message.get("role") not in _ROLES:
        raise invalid(path + ".role", "user, assistant or system is required")
    content = message.get("content")
    if not isinstance(content, (str, list)):
        raise invalid(path + ".content", "a string or a list of blocks is required")
    if isinstance(content, str):
        blocks: tuple = (Text(content),)
    else:
        blocks = reading.blocks(content, path + ".content")
        # a model's blocks in a person's mouth count for nothing
        if message["role"] != "assistant":
            blocks = tuple(b for b in blocks if not isinstance(b, (ToolCall, Thinking)))
    directive = message.get("output_config")
    effort = directive.get("effort") if isinstance(directive, dict) else None
    return (Turn(message["role"], blocks, {} if is_kept else None),
            effort if isinstance(effort, str) else None)


def _turns(messages: Any, reading: _Reading) -> tuple[tuple, str]:
    """(turns, effort): the effort is that of the last message that carries one.  Messages of an
    earlier body were parsed then: 0.2 us each against 6."""
    if not list_at(messages, "messages"):
        raise invalid("messages", "at least one message is required")
    turns, effort, made = [], "", getattr(messages, "made", ())
    for position, message in enumerate(messages):
        row = made[position] if position < len(made) else None
        if row is not None and row[0] is ANTHROPIC_BLOCKS:
            for step in row[2]:
                reading.note(*step)
        else:
            since = len(reading.steps)
            found = _turn(message, f"messages.{position}", reading, position < len(made))
            row = ANTHROPIC_BLOCKS, found, tuple(reading.steps[since:])
            if position < len(made):
                made[position] = row
        turn, told = row[1]
        turns.append(turn)
        effort = effort if told is None else told
    return tuple(turns), effort


def _system(value: Any) -> tuple:
    """System texts, one per block; Claude Code's billing line, which differs from one process to
    the next, is left out: it would spoil every prompt cache."""
    if value is None:
        return ()
    if not isinstance(value, (str, list)):
        raise invalid("system", "a string or a list of text blocks is required")
    texts = [value] if isinstance(value, str) else [
        b.text for b in _Reading(ANTHROPIC_BLOCKS).blocks(value, "system") if isinstance(b, Text)]
    return tuple(t for t in texts if t.strip() and not t.startswith("x-anthropic-billing-header:"))


def _tool(row: Any, path: str, is_kept: bool) -> Tool | str:
    """The tool of a row, or the type of one that only Anthropic's own service runs."""
    row = dict_at(row, path)
    kind = row.get("type")
    if kind is not None and not isinstance(kind, str):
        raise invalid(path + ".type", "a string is required")
    if kind in (None, "custom"):
        schema = row.get("input_schema")
        if schema is not None and not isinstance(schema, dict):
            raise invalid(path + ".input_schema", "an object is required")
    else:
        known = next((CLIENT_TOOLS[p] for p in CLIENT_TOOLS if kind.startswith(p)), None)
        if known is None:
            return kind
        schema = {"type": "object", "properties": {n: {"type": t} for n, t in known.items()}}
    name = text_at(row.get("name"), path + ".name")
    if not name:
        raise invalid(path + ".name", "a name is required")
    description = row.get("description")
    text = description if isinstance(description, str) else ""
    examples = row.get("input_examples")
    if isinstance(examples, list) and examples:
        text += "\nExamples: " + "; ".join(map(json_encode, examples[:2]))
    return Tool(name, text, schema or {}, kept={} if is_kept else None)


def _tools(value: Any, mentioned: Mapping[str, None]) -> tuple[tuple, dict[str, str]]:
    """(tools the client runs itself, names of Anthropic's own -> their types).  Deferred ones count
    from their first mention on, after the others.  Of two with one name the last wins."""
    plain, deferred, hosted = {}, {}, {}
    made = getattr(value, "made", ())
    for position, row in enumerate(list_at(value, "tools") if value is not None else ()):
        kept = made[position] if position < len(made) else None
        if kept is None or kept[0] is not CLIENT_TOOLS:
            kept = CLIENT_TOOLS, _tool(row, f"tools.{position}", position < len(made))
            if position < len(made):
                made[position] = kept
        tool = kept[1]
        if isinstance(tool, str):
            hosted[str(row.get("name") or tool)] = tool[:40]
        elif tool.name != "DeferredToolPlaceholder":
            if not row.get("defer_loading"):
                plain[tool.name] = tool
            elif tool.name in mentioned:
                deferred[tool.name] = tool
    tools = tuple(plain.values()) + tuple(deferred[n] for n in mentioned if n in deferred)
    return tools, hosted


def _tool_choice(value: Any, tools: tuple, offered: set, hosted: Mapping) -> tuple[tuple, bool]:
    """((mode, name), whether parallel calls are unwanted).  `offered` are all names the client
    gave, `hosted` those that are left out: they cannot be forced."""
    if value is None:
        return ("auto", ""), False
    kind = dict_at(value, "tool_choice").get("type")
    if kind not in ("auto", "any", "tool", "none"):
        raise invalid("tool_choice.type", "auto, any, tool or none is required")
    name = ""
    if kind == "tool":
        name = text_at(value.get("name"), "tool_choice.name")
        if name in hosted:
            raise invalid("tool_choice", f"{hosted[name]} is run by Anthropic's own service only")
        if name in offered and name not in {tool.name for tool in tools}:
            kind, name = "auto", ""
        elif name not in offered:
            raise invalid("tool_choice.name", f"{name!r} is not among the tools")
    return (kind, name), value.get("disable_parallel_tool_use") is True


def _thinking(body: Mapping, effort: str) -> ThinkingWish:
    config = body.get("output_config")
    config = dict_at(config, "output_config") if config is not None else {}
    effort = effort or config.get("effort") or ""
    if not isinstance(effort, str):
        raise invalid("output_config.effort", "a string is required")
    thinking = body.get("thinking")
    if thinking is None:
        return ThinkingWish(None, None, effort)
    kind = dict_at(thinking, "thinking").get("type")
    if kind not in ("enabled", "disabled", "adaptive"):
        raise invalid("thinking.type", "enabled, disabled or adaptive is required")
    budget = None
    if kind == "enabled":
        budget = thinking.get("budget_tokens")
        if type(budget) is not int or budget < 1:
            raise invalid("thinking.budget_tokens", "a positive whole number is required")
    return ThinkingWish(kind != "disabled", budget, effort, thinking.get("display") != "omitted")


def _json_schema(body: Mapping) -> dict | None:
    config = body.get("output_config")
    wanted = config.get("format") if isinstance(config, dict) else None
    wanted = wanted or body.get("output_format")
    if isinstance(wanted, dict) and wanted.get("type") == "json_schema":
        return dict_at(wanted.get("schema"), "output_config.format.schema")
    return None


def _session(body: Mapping, headers: Mapping[str, str]) -> str:
    """What all requests of one conversation share; "" when the client does not say."""
    if headers.get("x-claude-code-session-id"):
        return headers["x-claude-code-session-id"]
    metadata = body.get("metadata")
    user_id = metadata.get("user_id") if isinstance(metadata, dict) else None
    if isinstance(user_id, str) and user_id.startswith("{"):
        with contextlib.suppress(ValueError, RecursionError):   # not JSON: taken as it stands
            return str(json.loads(user_id).get("session_id") or user_id)
    if isinstance(user_id, str) and "_session_" in user_id:
        return user_id.rpartition("_session_")[2]
    return session_key(body, headers)


def _plain_text(content: Any) -> str:
    """A content that is one text, "" for any other."""
    if isinstance(content, list) and len(content) == 1 and isinstance(content[0], dict):
        content = content[0].get("text") if content[0].get("type") == "text" else ""
    return content if isinstance(content, str) else ""


class _Asked(NamedTuple):
    """What tells a small request: its last message and structure."""
    text: str           # of the last message, "" unless that is one text
    is_string: bool     # ... given as a plain string
    is_alone: bool      # the only message, without tools
    is_whole: bool      # not streamed
    thinks: bool
    is_cli: bool        # comes from Claude Code
    system: str
    most: Any           # max_tokens
    wanted: frozenset   # properties of the JSON it wants


SMALL_REQUESTS = (      # kind, its shape as seen on the wire, versions 1.0.128 to 2.1.329
    ("probe", lambda a: a.is_alone and a.is_whole and a.most == 1 and not a.thinks and (
        a.text == "quota" and not a.system or a.text == "Hi" and a.is_cli)),
    ("suggestion", lambda a: a.is_string and a.text.startswith("[SUGGESTION MODE:")),
    ("warmup", lambda a: a.is_alone and a.is_cli and not a.is_whole and a.text == "Warmup"),
    ("title", lambda a: a.is_alone and not a.thinks and a.wanted == {"title"}
     and "<session>" in a.text),
    ("topic", lambda a: a.is_alone and not a.thinks and "isNewTopic" in a.system
     and isinstance(a.most, int) and a.most <= 512),
    ("paths", lambda a: a.is_alone and not a.thinks and a.text.startswith("Command:")
     and "xtract any file paths" in a.system),
    ("summary", lambda a: a.is_alone and not a.thinks and (
        a.text.startswith("Please write a 5-10 word title")
        or "Summarize this coding conversation in under 50 characters" in a.system)),
)
# one of these, or `<session>` in the text, is in each of them; `in` is faster than a pattern
_SMALL_TEXT = re.compile(r"(?:quota|Hi|Warmup)\Z|\[SUGGESTION MODE:|Command:|"
                         "Please write a 5-10 word title")
_SMALL_SYSTEMS = ("isNewTopic", "Summarize this coding conversation in under 50 characters")


def anthropic_small_request(body: Mapping, headers: Mapping[str, str]) -> str:
    """Which of Claude Code's small requests this is, "" for a real turn.  The history never counts:
    who quotes such a request means something else."""
    messages = body.get("messages")
    last = object_of(messages[-1]) if isinstance(messages, list) and messages else {}
    is_alone = isinstance(messages, list) and len(messages) == 1 and not body.get("tools")
    if last.get("role") != "user" or not (is_alone or isinstance(last.get("content"), str)):
        return ""
    text, system = _plain_text(last.get("content")), body.get("system") or ""
    told = system if isinstance(system, str) else "\n".join(
        str(b.get("text")) for b in objects_of(system))
    if not (_SMALL_TEXT.match(text) or "<session>" in text or any(
            [sign in told for sign in _SMALL_SYSTEMS])):
        return ""       # as most are: 1.3 us against 3.1 for the table
    config = object_of(body.get("output_config"))
    schema = object_of(object_of(config.get("format") or body.get("output_format")).get("schema"))
    asked = _Asked(
        text, isinstance(last.get("content"), str),
        is_alone, not body.get("stream"),
        object_of(body.get("thinking")).get("type") in ("enabled", "adaptive"),
        headers.get("user-agent", "").startswith("claude-cli/") or told.startswith(
            ("x-anthropic-billing-header:", "You are Claude Code")),
        told, body.get("max_tokens"), frozenset(object_of(schema.get("properties"))))
    return next((kind for kind, fits in SMALL_REQUESTS if fits(asked)), "")


def _client_window(model: str, headers: Mapping[str, str]) -> int:
    """What Claude Code takes for the model's window, which decides when it compacts."""
    if "context-1m-" in headers.get("anthropic-beta", "") or model.endswith("[1m]"):
        return CLIENT_WIDE_WINDOW
    if model.startswith(("claude", "opus", "sonnet", "haiku")):
        return CLIENT_WINDOW
    version = re.match(r"claude-cli/(\d+)\.(\d+)\.(\d+)", headers.get("user-agent", ""))
    is_late = bool(version) and tuple(map(int, version.groups())) >= WIDE_SINCE
    return CLIENT_WIDE_WINDOW if is_late else CLIENT_WINDOW


def _search_wish(rows: Any, tools: tuple) -> SearchWish | None:
    """What a request of its own for the web wants.  Beside functions a search is left out: no
    upstream here takes both."""
    for row in objects_of(rows) if not tools else ():
        kind = re.match(r"(web_search|web_fetch)_\d", str(row.get("type")))
        if kind:
            domains = (row.get(f"{word}_domains") for word in ("allowed", "blocked"))
            allowed, blocked = (tuple(d for d in ds if isinstance(d, str))
                                if isinstance(ds, list) else () for ds in domains)
            return SearchWish(kind[1], allowed, blocked)
    return None


def _asked_tools(body: Mapping, reading: _Reading) -> dict:
    """Fields about tools, the search that is asked for, and what nobody here takes."""
    choice = body.get("tool_choice")
    if isinstance(choice, dict) and isinstance(choice.get("name"), str):
        reading.mentioned.setdefault(choice["name"])
    tools, hosted = _tools(body.get("tools"), reading.mentioned)
    tools = tuple(t for t in tools if t.name not in reading.removed)
    search = _search_wish(body.get("tools"), tools)
    if search is not None:
        hosted = {n: kind for n, kind in hosted.items() if not kind.startswith("web_")}
    offered = {t["name"] for t in body.get("tools") or () if isinstance(t.get("name"), str)}
    tool_choice, one_call = _tool_choice(choice, tools, offered, hosted)
    return {"tools": tools, "tool_choice": tool_choice, "one_call": one_call, "search": search,
            "left_out": tuple(dict.fromkeys((*hosted.values(), *reading.unread)))}


_WISHES = ("stop_sequences", "temperature", "top_p", "top_k", "thinking", "output_config",
           "output_format")


def _asked_ways(body: Mapping, model: str, effort: str) -> dict:
    """Fields about how to answer, the system's texts with them: errors keep one order."""
    stops = list_at(body.get("stop_sequences") or [], "stop_sequences")
    top_k = number_at(body, "top_k", 0, 1 << 31)
    _, wish = model_variant(model)
    asked = _thinking(body, effort)
    return {
        "system": _system(body.get("system")),
        "temperature": number_at(body, "temperature", 0, 2),
        "top_p": number_at(body, "top_p", 0, 1), "top_k": None if top_k is None else int(top_k),
        "stop_sequences": tuple(text_at(s, f"stop_sequences.{i}") for i, s in enumerate(stops)),
        "thinking": replace(wish, shows_text=asked.shows_text) if wish else asked,
        "json_schema": _json_schema(body)}


def _anthropic_fields(body: Mapping, model: str, is_count: bool) -> dict:
    """Fields of the Request that other dialects need; ProxyError where they cannot take it."""
    if body.get("thread") is not None:      # the SDK's tool runner goes on without when told so
        error = invalid("thread", "threads are not supported")
        error.details = {"error_code": "thread_unsupported_request"}
        raise error
    if body.get("mcp_servers"):
        raise invalid("mcp_servers", "not supported by this model's provider")
    max_tokens = body.get("max_tokens")
    if type(max_tokens) is not int or max_tokens < 0:
        if not is_count:
            raise invalid("max_tokens", "a whole number is required")
        max_tokens = 1
    reading = _Reading(ANTHROPIC_BLOCKS)
    turns, effort = _turns(body.get("messages"), reading)
    fields = {"turns": turns, "max_tokens": max_tokens}
    if not body.keys().isdisjoint(("tools", "tool_choice")):
        fields.update(_asked_tools(body, reading))
    elif reading.unread:
        fields["left_out"] = tuple(reading.unread)
    if effort or model_variant(model)[1] or not body.keys().isdisjoint(_WISHES):
        fields.update(_asked_ways(body, model, effort))
    else:
        fields["system"] = _system(body.get("system"))
    return fields


def anthropic_parse_request(body: Any, headers: Mapping[str, str], is_count: bool = False,
                            raw: bytes = b"", query: str = "", **_: Any) -> Request:
    """The neutral Request of a Messages body.  Raises ProxyError invalid_request with the path of
    the offending field; what only an upstream of this dialect can judge (newer clients' blocks and
    fields) stands in `refusal` instead.  Unknown fields are ignored."""
    body = dict_at(body, "body")
    model, is_streaming = model_at(body), flag_at(body, "stream")
    fields = fields_for_others(lambda: _anthropic_fields(body, model, is_count), raw)
    seen = tuple([(n, v) for n, v in headers.items() if n.startswith("anthropic-")])
    return Request(
        model=model, wanted=model_variant(model)[0], session=_session(body, headers),
        agent=headers.get("x-claude-code-agent-id", ""),
        parent=headers.get("x-claude-code-parent-agent-id", ""), is_streaming=is_streaming,
        small="" if is_count else anthropic_small_request(body, headers),
        window_tokens=_client_window(model, headers),
        native=Native("anthropic", raw, seen, query) if raw else None, **fields)


# Relaying: a request of this dialect to an upstream of this dialect.  Only the model's name, our
# own marks and what a repair names are changed; the rest goes byte for byte, fields and blocks
# nobody here has heard of included.

MOST_BLOCKS = 100_000       # of a message that must be looked through
_MARKS = re.compile(r'agp1\.|srvtoolu_agp|"signature"\s*:\s*(?:""|null)|"encrypted_index"\s*:\s*""')
BETA_FIELDS = (     # a beta and what it brings into the body come and go together
    ("context-management-", "context_management"), ("effort-", "output_config.effort"),
    ("structured-outputs-", "output_config.format"), ("structured-outputs-", "output_format"),
    ("structured-outputs-", "tools.*.strict"), ("task-budgets-", "output_config.task_budget"),
    ("dangerous-tool-use-", "safeguards"), ("mcp-client-", "mcp_servers"),
    ("advanced-tool-use-", "tools.*.defer_loading"), ("code-execution-", "container"),
    ("advanced-tool-use-", "tools.*.input_examples"), ("fallback-credit-", "fallback_credit_token"),
    ("server-side-fallback-", "fallbacks"), ("thinking-binding-", "thinking.block_binding"),
    ("fine-grained-tool-streaming-", "tools.*.eager_input_streaming"),
    ("prompt-caching-scope-", "system.*.cache_control.scope"),
    ("prompt-caching-scope-", "tools.*.cache_control.scope"),
    ("prompt-caching-scope-", "messages.*.content.*.cache_control.scope"),
)


def beta_fields(name: str) -> list[tuple[str, str]]:
    """The rows of BETA_FIELDS that go when a beta, or a path of the body as Anthropic spells it
    (`tools.0.custom.strict`), is refused."""
    ends = name.split(".")[0], name.split(".")[-1]
    betas = {beta for beta, path in BETA_FIELDS if name.startswith(beta)
             or (path.split(".")[0], path.split(".")[-1]) == ends}
    return [row for row in BETA_FIELDS if row[0] in betas]


def _is_ours(block: Any, keeps_unsigned: bool) -> bool:
    """Whether a block of the history was made here, and means nothing to Anthropic's servers."""
    if not isinstance(block, dict):
        return False
    signature = block.get("signature")
    if block.get("type") == "thinking":
        return str(signature).startswith("agp1.") or not (signature or keeps_unsigned)
    return str(block.get("id") or block.get("tool_use_id") or "").startswith("srvtoolu_agp")


def _relay_message(text: str, leaves_out: Callable[[Any], bool], is_all: bool) -> str:
    """A message's JSON without the blocks that are to be left out, "" where nothing is left.  Only
    blocks with a mark are looked into, or all."""
    content = next((span for span in json_spans(text) if span[0] == "content"), None)
    if content is None or text[content[2]] != "[":
        return text
    kept, is_whole = [], True
    for number, _, at, end in json_spans(text, content[2]):
        if number > MOST_BLOCKS:
            raise invalid("messages", f"a message of more than {MOST_BLOCKS} blocks")
        block = text[at:end]
        if is_all or _MARKS.search(block) or '"signature"' not in block and "thinking" in block:
            value = json.loads(block)
            if leaves_out(value):
                is_whole = False
                continue
            if any(c.get("encrypted_index") == "" for c in objects_of(
                    object_of(value).get("citations"))):    # of a search that was ours
                block, is_whole = json_splice(block, {"citations": None}), False
        kept.append(block)
    if is_whole:
        return text
    return json_splice(text, {"content": "[" + ",".join(kept) + "]"}) if kept else ""


def _paired(messages: list) -> list:
    """Messages in which every call is answered in the next turn, and nothing else is; what does not
    fit is told as text."""
    out: list = []
    calls: list = []

    def missing(call_id: str) -> dict:
        return {"type": "tool_result", "tool_use_id": call_id, "is_error": True,
                "content": NO_RESULT.text}
    for message in messages:
        content = message.get("content")
        blocks = objects_of(content) if isinstance(content, list) else [
            {"type": "text", "text": content}]
        if message.get("role") == "user":
            given = {b.get("tool_use_id"): b for b in blocks if b.get("type") == "tool_result"}
            kept = [given.get(i) or missing(i) for i in calls]
            for block in blocks:
                if block.get("type") != "tool_result":
                    kept.append(block)
                elif block.get("tool_use_id") not in calls:
                    told = block.get("content") or ""
                    kept += [{"type": "text", "text": NO_CALL.text},
                             *(objects_of(told) if isinstance(told, list) else
                               [{"type": "text", "text": told}] * bool(told))]
            message, calls = {**message, "content": kept}, []
        elif message.get("role") == "assistant":
            out += [{"role": "user", "content": [missing(i) for i in calls]}] * bool(calls)
            calls = [b.get("id") for b in blocks if b.get("type") == "tool_use"]
        out.append(message)
    return out + [{"role": "user", "content": [missing(i) for i in calls]}] * bool(calls)


def _relay_messages(text: str, repairs: frozenset, keeps_unsigned: bool) -> str:
    """`messages` for the upstream.  Only messages with something to leave out are touched."""
    def leaves_out(block: Any) -> bool:
        return _is_ours(block, keeps_unsigned) or "thinking" in repairs and (
            isinstance(block, dict) and block.get("type") in ("thinking", "redacted_thinking"))
    if "pairs" in repairs:
        text = json_encode(_paired(objects_of(json.loads(text))))
    out, is_whole = [], "pairs" not in repairs
    for _, _, at, end in json_spans(text):
        message = text[at:end]
        edited = _relay_message(message, leaves_out, "thinking" in repairs)
        if "system_role" in repairs and json.loads(message).get("role") == "system":
            told = "\n".join(b.text for b in _Reading(ANTHROPIC_BLOCKS).blocks(
                json.loads(message).get("content") or "", "content") if isinstance(b, Text))
            edited = json_encode({"role": "user", "content": reminder(told)}) if told else ""
        is_whole = is_whole and edited is message
        out += [edited] if edited else []
    if "last_turn" in repairs and out and json.loads(out[-1]).get("role") == "assistant":
        out.append(json_encode({"role": "user", "content": "Continue."}))
        is_whole = False
    return text if is_whole else "[" + ",".join(out) + "]"


def _variant_fields(model: str, body: Mapping) -> dict[str, str]:
    """Members of the body as JSON that carry out what the model's name says about thinking."""
    _, wish = model_variant(model)
    forced = object_of(body.get("tool_choice")).get("type") in ("any", "tool")
    if wish is None or (wish.is_on and (forced or body.get("temperature") not in (None, 1))):
        return {}               # Anthropic refuses thinking beside those
    if not wish.is_on:
        return {"thinking": '{"type":"disabled"}'}
    if wish.budget_tokens is None:
        fields = {"thinking": '{"type":"adaptive"}'}
        if wish.effort:
            effort = {"minimal": "low"}.get(wish.effort, wish.effort)
            fields["output_config"] = json_encode({**object_of(body.get("output_config")),
                                                   "effort": effort})
        return fields
    budget, most = max(1024, wish.budget_tokens), body.get("max_tokens")
    fields = {"thinking": json_encode({"type": "enabled", "budget_tokens": budget})}
    if isinstance(most, int) and most <= budget:
        fields["max_tokens"] = str(budget + most)
    return fields


def _relay_headers(request: Request, repairs: Iterable[str]) -> dict[str, str]:
    headers = {"anthropic-version": "2023-06-01", **dict(request.native.headers)}
    given = headers.pop("anthropic-beta", "")
    betas = [b.strip() for b in given.split(",") if b.strip()]
    dropped = [r[5:] for r in repairs if r.startswith("drop ")]
    gone = [beta for name in dropped for beta, _ in beta_fields(name)]
    kept = [b for b in betas if b not in dropped and not b.startswith(tuple(gone))]
    if request.model.lower().endswith("[1m]") and "context-1m-" not in given:
        kept.append("context-1m-2025-08-07")
    if kept:
        headers["anthropic-beta"] = given if kept == betas else ",".join(kept)
    return headers


def anthropic_relay_request(request: Request, target: Target,
                            repairs: frozenset = frozenset()) -> Rendered:
    """The client's own body and headers for an Anthropic upstream.  `repairs` of its refusals:
    `thinking`, `no_thinking`, `pairs`, `system_role`, `last_turn`, `drop <beta or path>`."""
    text, changes, mended = request.native.raw.decode("utf-8"), {}, Mended()
    if not is_paired(request.turns):        # a sure refusal, after a compaction or an interruption
        repairs |= {"pairs"}
        mended["results and calls paired"] += 1
    if request.model != target.upstream_id:
        changes["model"] = quote(target.upstream_id)
    try:
        # a variant: its wish is the owner's; unless what looks like one is the model's own name
        name = WINDOW_MARK.sub("", request.model.lower())
        if request.wanted != request.model and not name.endswith(target.upstream_id.lower()):
            changes.update(_variant_fields(request.model, json.loads(text)))
        if "no_thinking" in repairs:
            changes["thinking"] = None
        dropped = [r[5:] for r in repairs if r.startswith("drop ")]
        paths = [path.split(".") for name in dropped
                 for path in [p for _, p in beta_fields(name)] or [name]]
        # a thought without any signature leaves the two words out of balance
        has_field = re.search(r'"thinking"\s*:\s*\{', text) is not None
        is_unsigned = text.count('"thinking":') - has_field > text.count('"signature":')
        for name, _, at, end in json_spans(text) if (
                repairs or is_unsigned or _MARKS.search(text)) else ():
            part = text[at:end]
            mine = [path for path in paths if path[0] == name]
            if mine:
                value = {name: json.loads(part)}
                for path in mine:
                    value = without(value, path)
                part = json_encode(value[name]) if name in value else ""
            if name == "messages" and part:
                part = _relay_messages(part, repairs,
                                       "unsigned_thinking" in target.provider.quirks)
            if part != text[at:end]:
                changes[name] = part or None
    except RecursionError as err:
        raise invalid("", "nested too deeply") from err
    raw = json_splice(text, changes).encode("utf-8") if changes else request.native.raw
    return Rendered(raw, _relay_headers(request, repairs), AnswerShape(), mended)


# Requests to Anthropic upstreams, of clients that speak another language

class _Messages:
    """Turns -> `messages` for one target; `sent` are the signatures that went along."""

    def __init__(self, target: Target, signatures: Any, mended: Mended, is_thinking: bool):
        self.target, self.signatures, self.mended = target, signatures, mended
        self.is_thinking, self.sent = is_thinking, []
        self.is_lax = "unsigned_thinking" in target.provider.quirks

    def render(self, turns: list[Turn]) -> list[dict]:
        sides = {"assistant": self._model_block, "user": self._user_block}
        return [{"role": turn.role, "content": [
            row for block in turn.blocks for row in sides[turn.role](block)] or [
                {"type": "text", "text": "."}]} for turn in turns]

    def _model_block(self, block: Any) -> list[dict]:
        if isinstance(block, Thinking):
            signature = thought_signature(block, self.signatures, "c",
                                          self.target.provider.signature_tag)
            if signature and signature.kind == "t" and (self.is_thinking or self.is_lax):
                self.sent.append(signature.raw)
                return [{"type": "thinking", "thinking": block.text, "signature": signature.raw}]
            if self.is_lax and block.text and not block.signature:     # signs none, and wants them
                return [{"type": "thinking", "thinking": block.text, "signature": ""}]
            self.mended["thoughts of other models left out"] += bool(block.text)
            return []
        if isinstance(block, ToolCall):
            return [{"type": "tool_use", "id": tool_id(block.id), "name": tool_name(block.name),
                     "input": block.arguments}]
        return [{"type": "text", "text": block.text}] if isinstance(block, Text) else []

    def _user_block(self, block: Any) -> list[dict]:
        if isinstance(block, ToolResult):
            content = [row for b in block.blocks for row in self._user_block(b)]
            return [{"type": "tool_result", "tool_use_id": tool_id(block.call_id),
                     **({"content": content} if content else {}),
                     **({"is_error": True} if block.is_error else {})}]
        if isinstance(block, Media):
            source = {"type": "url", "url": block.url} if block.url else {
                "type": "base64", "media_type": block.media_type, "data": block.data}
            kind = "document" if block.media_type == "application/pdf" else "image"
            return [{"type": kind, "source": source}]
        return [] if is_blank(block) else [{"type": "text", "text": block.text}]


def _hidden(wish: ThinkingWish, target: Target) -> dict:
    """What the client does not see cannot come back: a signature is checked against its text."""
    is_shown = wish.shows_text or "unsigned_thinking" in target.provider.quirks
    return {} if is_shown else {"display": "omitted"}


def _native_thinking(request: Request, target: Target, may_think: bool, most: int) -> dict:
    """`thinking`, `output_config` and `max_tokens`: they depend on each other."""
    wish, name = request.thinking, target.upstream_id.lower()
    if not may_think or wish.is_on is not True:
        return {"max_tokens": most,
                **({"thinking": {"type": "disabled"}} if wish.is_on is False else {})}
    if any(fnmatch.fnmatchcase(name, p) for p in ADAPTIVE_MODELS) and wish.budget_tokens is None:
        effort = {"minimal": "low"}.get(wish.effort, wish.effort)
        return {"max_tokens": most, "thinking": {"type": "adaptive", **_hidden(wish, target)},
                **({"output_config": {"effort": effort}} if effort else {})}
    budget = max(1024, wish.budget_tokens or EFFORT_BUDGETS.get(wish.effort) or 8192)
    return {"max_tokens": most if most > budget else budget + most,
            "thinking": {"type": "enabled", "budget_tokens": budget, **_hidden(wish, target)}}


def _native_tools(request: Request, repairs: frozenset) -> dict:
    mode, name = request.tool_choice
    if request.search:
        wish, version = request.search, SEARCH_TOOLS[request.search.tool]
        return {"tools": [{"type": version, "name": wish.tool, **{
            f"{word}_domains": list(domains) for word, domains in (
                ("allowed", wish.allowed), ("blocked", wish.blocked)) if domains}}]}
    if not request.tools:
        return {}
    tools = []
    for tool in request.tools:
        schema = tool.schema if tool.schema.get("type") == "object" else {
            "properties": {}, **tool.schema, "type": "object"}
        if repairs & {"core_schemas", "bare_schemas"}:
            schema = core_schema(clean_schema(tool.schema, False))
        tools.append({"name": tool_name(tool.name), "description": tool.description,
                      "input_schema": schema})
    choice: dict = {"type": mode, **({"name": tool_name(name)} if mode == "tool" else {})}
    if request.one_call and mode != "none":
        choice["disable_parallel_tool_use"] = True
    return {"tools": tools, **({} if choice == {"type": "auto"} else {"tool_choice": choice})}


def _mark_for_cache(body: dict) -> None:
    """Two places up to which the upstream is to keep what it read: clients of other languages know
    no such marks, and pay for every turn without them."""
    mark = {"cache_control": {"type": "ephemeral"}}
    if "system" in body:
        body["system"][-1].update(mark)
    body["messages"][-1]["content"][-1].update(mark)


def _native_sampling(request: Request, is_thinking: bool) -> dict:
    """Thinking bears no temperature and a high top_p only; of those two one may be given."""
    fields: dict = {}
    if request.temperature is not None and not is_thinking:
        fields["temperature"] = min(1, request.temperature)
    elif request.top_p is not None and (not is_thinking or request.top_p >= 0.95):
        fields["top_p"] = request.top_p
    if request.top_k is not None and not is_thinking:
        fields["top_k"] = request.top_k
    return fields


def anthropic_render_request(request: Request, target: Target, signatures: Any,
                             repairs: frozenset = frozenset()) -> Rendered:
    """The Messages body of a request.  `repairs`: `signatures`, `no_thinking`, `limit N`,
    `core_schemas`, `schema_as_text`, `old_media`, `drop <beta or path>`."""
    mended, tag = Mended(), target.provider.signature_tag
    more_system, turns = repair_turns(request.turns, mended)
    turns = drop_old_media(turns) if "old_media" in repairs else turns
    may_think = not (request.tool_choice[0] in ("any", "tool") or repairs & {
        "signatures", "no_thinking"}) and ("unsigned_thinking" in target.provider.quirks or not
                                           has_unsigned_open_loop(turns, signatures, "c", tag))
    limits = [int(r[6:]) for r in repairs if r.startswith("limit ")]
    known = [target.model.output_tokens] if target.model.id in MODELS else []
    most = min([request.max_tokens or 32000, *known, *limits])
    fields = _native_thinking(request, target, may_think, most)
    is_thinking = fields.get("thinking", {}).get("type") in ("enabled", "adaptive")
    messages = _Messages(target, signatures, mended, is_thinking)
    body: dict = {"model": target.upstream_id, "messages": messages.render(turns), **fields,
                  "stream": True, **_native_tools(request, repairs)}
    system = [t for t in (*request.system, *more_system) if t.strip()]
    if request.json_schema is not None:
        if request.json_schema == ANY_OBJECT or "schema_as_text" in repairs or (
                "no_json_schema" in target.provider.quirks):
            system.append(schema_order(request.json_schema))
        else:
            body["output_config"] = {**body.get("output_config", {}), "format": {
                "type": "json_schema", "schema": request.json_schema}}
    if system:
        body["system"] = [{"type": "text", "text": text} for text in system]
    body.update(_native_sampling(request, is_thinking))
    stops = [s for s in request.stop_sequences if s.strip()]
    if stops:
        body["stop_sequences"] = stops
    if "user" in request.more:
        body["metadata"] = {"user_id": request.more["user"]}
    if "no_cache_control" not in target.provider.quirks:
        _mark_for_cache(body)
    for name in [r.partition(" ")[2] for r in repairs if r.startswith(("drop ", "unset "))]:
        for path in [p for _, p in beta_fields(name)] or [name]:
            body = without(body, path.split("."))
    betas = [beta for is_wanted, beta in (
        ("effort" in body.get("output_config", {}), "effort-2025-11-24"),
        ("format" in body.get("output_config", {}), "structured-outputs-2025-12-15"),
        ("tools" in body and "budget_tokens" in body.get("thinking", {}),
         "interleaved-thinking-2025-05-14")) if is_wanted and f"drop {beta}" not in repairs]
    headers = {"anthropic-version": "2023-06-01",
               **({"anthropic-beta": ",".join(betas)} if betas else {})}
    shape = answer_shape(request, turns, mended, "c", tag, signatures)
    return Rendered(body, headers, shape, mended, tuple(messages.sent))


# Answers

@dataclass
class AnthropicAnswer:
    """What is remembered between the deltas of one answer; lives as long as the request, over all
    of its tries, so that a second message_start is never sent."""
    model: str              # as the client named it
    id: str = field(default_factory=lambda: new_id("msg_"))
    begun: bool = False
    open_index: int = -1    # of the open block
    open_kind: Kind | None = None
    usage: Usage = Usage()
    scale: tuple = ()       # (the client's window, the model's) with usage_scaling


def scaled_tokens(count: int, window: int, limit: int) -> int:
    """Input tokens as a client with a smaller `window` is to see them: true up to half of where it
    compacts, then stretched so that it compacts ROOM_LEFT before the model's true `limit`."""
    compacts, knee = window - COMPACTS_BEFORE, (window - COMPACTS_BEFORE) // 2
    if limit - ROOM_LEFT <= compacts or count <= knee:
        return count
    return min(int(knee + (count - knee) * (compacts - knee) / (limit - ROOM_LEFT - knee)),
               window - 3000)


def scaled_usage(usage: Usage, scale: tuple) -> Usage:
    total = usage.input_tokens + usage.cached_tokens + usage.written_tokens
    if not scale or not total:
        return usage
    shown = scaled_tokens(total, *scale)
    cached, written = (n * shown // total for n in (usage.cached_tokens, usage.written_tokens))
    return replace(usage, input_tokens=shown - cached - written, cached_tokens=cached,
                   written_tokens=written)


def anthropic_usage(usage: Usage) -> dict:
    tokens: dict = {"input_tokens": usage.input_tokens,
                    "cache_creation_input_tokens": usage.written_tokens,
                    "cache_read_input_tokens": usage.cached_tokens,
                    "output_tokens": usage.output_tokens}
    if usage.searches:
        tokens["server_tool_use"] = {"web_search_requests": usage.searches}
    return tokens


def _message(state: AnthropicAnswer, content: list, stop_reason: str | None, usage: Usage) -> dict:
    tokens = {**anthropic_usage(scaled_usage(usage, state.scale)), "service_tier": "standard",
              "cache_creation": {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 0}}
    return {"id": state.id, "type": "message", "role": "assistant", "model": state.model,
            "content": content, "stop_reason": stop_reason, "stop_sequence": None, "usage": tokens}


def _event(name: str, data: dict) -> str:
    return f"event: {name}\ndata: {json_encode({'type': name, **data})}\n\n"


# Forms of the events of every answer, made of what the functions above say: 1.5 us against 7 for
# a beginning, 5 for an end.  A slot, which stands for any JSON, is filled in.

_SLOT = "\0"
_USAGE_TEXT = json_encode(anthropic_usage(Usage()))[:-1]


def _form(text: str) -> str:
    return text.replace("%", "%%").replace(json_encode(_SLOT), "%s")


_USAGE_FORM = _USAGE_TEXT.replace(":0", ":%d") + "%s"
_BEGIN_FORM = _form(_event("message_start", {"message": _message(
    AnthropicAnswer(_SLOT, _SLOT), [], None, Usage())})).replace(_USAGE_TEXT, "%s")
_FINISH_FORM = _form(_event("message_delta", {"delta": _SLOT, "usage": _SLOT})
                     + _event("message_stop", {}))
_CALL_FORMS = {kind: _form(_event("content_block_start", {"index": _SLOT, "content_block": {
    "type": word, "id": _SLOT, "name": _SLOT, "input": {}}})) for kind, word in {      # [A2]
        Kind.CALL: "tool_use", Kind.SERVER_CALL: "server_tool_use"}.items()}


def _usage_text(usage: Usage, scale: tuple, output_tokens: int) -> str:
    """The JSON of `anthropic_usage`, without its closing brace."""
    if scale:
        usage = scaled_usage(usage, scale)
    searches = ',"server_tool_use":{"web_search_requests":%d}' % usage.searches
    return _USAGE_FORM % (usage.input_tokens, usage.written_tokens, usage.cached_tokens,
                          output_tokens, searches if usage.searches else "")


def _begin_event(state: AnthropicAnswer, delta: Begin) -> str:
    if state.begun:
        return ""
    state.begun, state.usage = True, delta.usage
    return _BEGIN_FORM % (quote(state.id), quote(state.model), _usage_text(
        delta.usage, state.scale, max(1, delta.usage.output_tokens)))


def _found_block(found: Found) -> dict:
    content: Any = [{"type": "web_search_result", "url": url, "title": title,
                     "encrypted_content": "", "page_age": None} for url, title in found.sources]
    kind = f"{found.name}_tool_result"
    if found.error:
        content = {"type": kind + "_error", "error_code": found.error}
    return {"type": kind, "tool_use_id": found.call_id, "content": content}


def _citation(text: str) -> dict:
    told = json.loads(text)
    return told if "type" in told else {
        "type": "web_search_result_location", "url": told["url"], "title": told["title"],
        "cited_text": told["text"], "encrypted_index": ""}


_START_FORMS = {kind: _event("content_block_start", {
    "index": 0, "content_block": block}).replace(":0,", ":%d,") for kind, block in {
        Kind.TEXT: {"type": "text", "text": ""},
        Kind.THINKING: {"type": "thinking", "thinking": "", "signature": ""}}.items()}


def _start_event(state: AnthropicAnswer, delta: BlockStart) -> str:
    state.open_index, state.open_kind = delta.index, delta.kind
    if delta.kind in _START_FORMS:
        return _START_FORMS[delta.kind] % delta.index
    if delta.kind in _CALL_FORMS:
        return _CALL_FORMS[delta.kind] % (delta.index, quote(delta.id), quote(delta.name))
    block: dict = delta.block if delta.kind is Kind.OPAQUE else _found_block(delta.block)
    return _event("content_block_start", {"index": delta.index, "content_block": block})


_DELTA = ('event: content_block_delta\ndata: {"type":"content_block_delta","index":%%d,'
          '"delta":{"type":"%s","%s":%%s}}\n\n')
_BLOCK_STOP = 'event: content_block_stop\ndata: {"type":"content_block_stop","index":%d}\n\n'
_DELTA_FORMS = {kind: _DELTA % words for kind, words in {
    Kind.TEXT: ("text_delta", "text"), Kind.THINKING: ("thinking_delta", "thinking"),
    Kind.ARGUMENTS: ("input_json_delta", "partial_json"),
    Kind.SIGNATURE: ("signature_delta", "signature")}.items()}


def _piece_event(state: AnthropicAnswer, delta: Piece) -> str:
    if delta.kind is Kind.CITATION:
        return _event("content_block_delta", {"index": delta.index, "delta": {
            "type": "citations_delta", "citation": _citation(delta.text)}})
    return _DELTA_FORMS[delta.kind] % (delta.index, quote(delta.text))


@functools.lru_cache(maxsize=64)
def _run_form(kind: Kind, index: int) -> tuple[str, str]:
    """What stands before and after each text of a Run."""
    before, _, after = (_DELTA_FORMS[kind] % (index, '"\0"')).partition("\0")
    return before, after


def _run_event(state: AnthropicAnswer, delta: Run) -> str:
    before, after = _run_form(delta.kind, delta.index)
    return before + (after + before).join(delta.raw) + after


def _end_event(state: AnthropicAnswer, delta: BlockEnd) -> str:
    state.open_kind = None
    return _BLOCK_STOP % delta.index


def _stop_fields(finish: Finish) -> dict:
    fields: dict = {"stop_reason": STOP_WORDS[finish.stop].anthropic,
                    "stop_sequence": finish.sequence}
    if finish.stop is Stop.REFUSAL:
        fields["stop_details"] = {"type": "refusal", "category": None,
                                  "explanation": finish.explanation}
    return fields


_STOP_TEXTS = {stop: json_encode(_stop_fields(Finish(stop, Usage()))) for stop in Stop
               if stop is not Stop.REFUSAL}


def _finish_event(state: AnthropicAnswer, delta: Finish) -> str:
    told = _STOP_TEXTS.get(delta.stop) if delta.sequence is None else None
    return _FINISH_FORM % (told or json_encode(_stop_fields(delta)), _usage_text(
        delta.usage, state.scale, delta.usage.output_tokens) + "}")


def _fault_event(state: AnthropicAnswer, delta: Fault) -> str:
    error = {"type": delta.error.rule.type, "message": delta.error.message}
    return _event("error", {"error": error})


ANTHROPIC_EVENTS: dict[type, Callable[[AnthropicAnswer, Any], str]] = {
    Piece: _piece_event, Run: _run_event, Begin: _begin_event, BlockStart: _start_event,
    BlockEnd: _end_event,
    Finish: _finish_event, Fault: _fault_event,
}


def anthropic_render_delta(state: AnthropicAnswer, delta: Any) -> str:
    """One neutral delta -> the text of its events, ASCII."""
    return ANTHROPIC_EVENTS[type(delta)](state, delta)


def anthropic_keep_alive(state: AnthropicAnswer, is_beat: bool) -> str:
    """A ping, or where that is not enough ([A5]) an empty delta of the open block."""
    if not is_beat:
        return 'event: ping\ndata: {"type":"ping"}\n\n'
    kind = {Kind.CALL: Kind.ARGUMENTS, Kind.SERVER_CALL: Kind.ARGUMENTS}.get(state.open_kind,
                                                                             state.open_kind)
    if kind in (Kind.TEXT, Kind.THINKING, Kind.ARGUMENTS):
        return _piece_event(state, Piece(state.open_index, kind, ""))
    return _event("message_delta", {"delta": {"stop_reason": None, "stop_sequence": None},
                                    "usage": anthropic_usage(scaled_usage(state.usage,
                                                                          state.scale))})


def anthropic_render_reply(state: AnthropicAnswer, reply: Reply) -> dict:
    """The Message object of a folded answer."""
    content: list[dict] = []
    for block in reply.blocks:
        if isinstance(block, Text):
            content.append({"type": "text", "text": block.text})
            if block.citations:
                content[-1]["citations"] = [_citation(json_encode(c)) for c in block.citations]
        elif isinstance(block, Thinking):
            content.append({"type": "thinking", "thinking": block.text,
                            "signature": block.signature})
        elif isinstance(block, (Opaque, Found)):
            content.append(block.block if isinstance(block, Opaque) else _found_block(block))
        else:
            kind = "tool_use" if isinstance(block, ToolCall) else "server_tool_use"
            content.append({"type": kind, "id": block.id, "name": block.name,
                            "input": block.arguments})
    return {**_message(state, content, None, reply.finish.usage), **_stop_fields(reply.finish)}


# Answers of Anthropic upstreams

def anthropic_path(target: Target, request: Request) -> str:
    query = request.native.query if request.native else ""
    parts = [p for p in query.split("&") if not re.match(r"(?i).*(key|token|auth)\w*=", p)]
    return "/v1/messages" + ("?" + "&".join(parts) if query and parts else "")


_STOPS = {words.anthropic: stop for stop, words in STOP_WORDS.items()}


def anthropic_parse_usage(usage: Any) -> dict[str, int]:
    """The counters a usage object has, as a METER; `input` includes what went through the cache."""
    usage = object_of(usage)
    read, written = (usage.get(f"cache_{n}_input_tokens") for n in ("read", "creation"))
    given = usage.get("input_tokens")
    found = {"input": given and given + (read or 0) + (written or 0), "cached": read,
             "written": written, "output": usage.get("output_tokens"),
             "thinking": object_of(usage.get("output_tokens_details")).get("thinking_tokens"),
             "searches": object_of(usage.get("server_tool_use")).get("web_search_requests")}
    return {name: count for name, count in found.items() if isinstance(count, int) and count > 0}


def _parse_block(block: dict) -> list[tuple[Kind, Any]]:
    """Pieces of a content_block_start, or of a whole block."""
    kind = block.get("type")
    if kind == "text":
        return [(Kind.TEXT, str(block.get("text") or "")),
                *((Kind.CITATION, c) for c in objects_of(block.get("citations")))]
    if kind == "thinking":
        signature = block.get("signature")
        return [(Kind.THINKING, str(block.get("thinking") or "") or None),
                *([(Kind.SIGNATURE, (str(signature), True))] if signature else ())]
    if kind in ("tool_use", "server_tool_use"):
        call = ToolCall(str(block.get("id") or ""), str(block.get("name") or ""),
                        block.get("input") or None)     # {} stands before the pieces that follow
        return [(Kind.CALL if kind == "tool_use" else Kind.SERVER_CALL, call)]
    return [(Kind.OPAQUE, block)]


def anthropic_parse_event(text: str) -> list[tuple[Kind, Any]]:
    """Loose pieces of one event.  Raises UpstreamFault for an error, ValueError for no event."""
    event = json.loads(text)
    if not isinstance(event, dict):
        raise ValueError("not an object")
    kind, delta = event.get("type"), object_of(event.get("delta"))
    if kind == "error":
        raise UpstreamFault(event)
    if kind == "content_block_delta":
        return [{"text_delta": lambda: (Kind.TEXT, str(delta.get("text") or "")),
                 "thinking_delta": lambda: (Kind.THINKING, str(delta.get("thinking") or "")),
                 "signature_delta": lambda: (Kind.SIGNATURE, (str(delta.get("signature")), True)),
                 "input_json_delta": lambda: (Kind.ARGUMENTS, str(delta.get("partial_json") or "")),
                 "citations_delta": lambda: (Kind.CITATION, object_of(delta.get("citation"))),
                 }.get(delta.get("type"), lambda: (Kind.TEXT, ""))()]
    if kind == "content_block_start":
        return _parse_block(object_of(event.get("content_block")))
    if kind == "content_block_stop":
        return [(Kind.BLOCK_END, None)]
    usage = object_of(event.get("message")).get("usage") if kind == "message_start" else (
        event.get("usage") if kind == "message_delta" else None)
    pieces: list[tuple[Kind, Any]] = [(Kind.METER, anthropic_parse_usage(usage))] if usage else []
    if delta.get("stop_reason"):
        stop = _STOPS.get(delta["stop_reason"], Stop.END)
        told = object_of(delta.get("stop_details")).get("explanation")
        pieces.append((Kind.FINISH, (stop, str(delta.get("stop_sequence") or told or ""))))
    return pieces


class AnthropicPlain(PlainEvents):
    form = (r'\{"type":"content_block_delta","index":COUNT,"delta":\{"type":"'
            rf'(?:text_delta","text|(?P<thinks>thinking_delta","thinking))":"(?P<text>{PLAIN_TEXT})'
            r'(?P<usage>)(?P<rest>" *\} *\})').replace("COUNT", COUNT)


class AnthropicRelay(EventRelay):
    """Events of an Anthropic upstream on their way to an Anthropic client; the open block is read
    too.  A beginning waits for the first content, and is left out when one was sent before."""
    _held = ""
    last_word = 'event: message_stop\ndata: {"type":"message_stop"}\n\n'

    def feed(self, event: str) -> str:
        """What goes to the client for one event (its text without the empty line)."""
        if event.startswith("event: content_block_delta\n") and self.state.begun:
            return event + "\n\n"
        data = "\n".join(line[5:].lstrip() for line in event.split("\n") if line[:5] == "data:")
        value = json.loads(data) if data.startswith("{") else {}
        kind = value.get("type") if isinstance(value, dict) else None
        if not isinstance(kind, str) or not kind.isidentifier():
            return ""                   # a comment, or `[DONE]`
        if kind == "error":
            raise UpstreamFault(value)
        lines = data.replace("\n", "\ndata: ")      # JSON may stand on several
        text = f"event: {kind}\ndata: {lines}\n\n"
        if kind == "message_start":
            message = object_of(value.get("message"))
            self.counts.update(anthropic_parse_usage(message.get("usage")))
            if "model" in message:
                span = next(s for s in json_spans(data) if s[0] == "message")
                inner = json_splice(data[span[2]:span[3]], {"model": quote(self.state.model)})
                data = data[:span[2]] + inner + data[span[3]:]
                text = "event: {}\ndata: {}\n\n".format(kind, data.replace("\n", "\ndata: "))
            self._held = text
            return ""
        return self._read(kind, value, text)

    def _read(self, kind: str, value: dict, text: str) -> str:
        state = self.state
        if kind == "content_block_start":
            words = {"text": Kind.TEXT, "thinking": Kind.THINKING, "tool_use": Kind.CALL,
                     "server_tool_use": Kind.SERVER_CALL}
            state.open_kind = words.get(object_of(value.get("content_block")).get("type"))
            index = value.get("index")
            state.open_index = index if isinstance(index, int) else 0
        elif kind == "content_block_stop":
            state.open_kind = None
        elif kind == "message_delta":
            self.counts.update(anthropic_parse_usage(value.get("usage")))
            self.has_finish |= bool(object_of(value.get("delta")).get("stop_reason"))
        self.is_over = self.is_over or kind == "message_stop"
        self.has_content = self.has_content or kind.startswith("content_block") or self.has_finish
        if not self.has_content or kind == "ping":
            return ""                   # pings are ours to send: a beat must not wait for them
        state.usage = self.usage()
        if not state.begun:
            begin = self._held or _begin_event(state, Begin(state.usage))
            state.begun = True
            return begin + text
        return text

    def read_whole(self, value: dict) -> None:
        if not isinstance(value.get("content"), list):
            raise UpstreamFault(value)
        self.counts.update(anthropic_parse_usage(value.get("usage")))


def anthropic_render_error(error: ProxyError, request_id: str) -> dict:
    body = {"type": error.rule.type, "message": error.message}
    if error.details:
        body["details"] = error.details
    return {"type": "error", "error": body, "request_id": request_id}


def anthropic_render_model(model: Model) -> dict:
    """A row of /v1/models.  Claude Code keeps only ids that begin with `claude`."""
    has_images = model.family != "gpt-oss"
    return {"type": "model", "id": model.id, "display_name": model.label,
            "created_at": "2026-01-01T00:00:00Z", "max_input_tokens": model.context_tokens,
            "max_tokens": model.output_tokens,
            "capabilities": {"image_input": {"supported": has_images},
                             "pdf_input": {"supported": has_images},
                             "thinking": {"supported": model.max_budget > 0}}}


# ── 10. OpenAI dialects ───────────────────────────────────────────────────
# Chat Completions with its older sister Completions, and Responses (OpenAI's
# reference, its SDKs, Codex 0.169, OpenCode 1.18 and Vercel's SDK on the wire).
# A Chat stream is one shape of chunk, `data:` lines only, and then `[DONE]`:
#
#     role (reasoning_content | content | tool_calls)* finish_reason [usage]
#
# A Responses stream numbers all its events and repeats itself at every end:
#
#     response.created response.in_progress
#     (output_item.added … deltas … output_item.done)*      response.completed
#
# [C1] `index` of tool_calls counts calls from 0; id, type and name come once, in the first delta.
# [C2] Usage only where include_usage asks for it: a last chunk without choices.
# [C3] A frame with `error` ends a stream that broke; SDKs raise on it.
# [R1] Codex takes items from output_item.done and needs response.completed, also after a limit.
# [R2] Items are told apart by output_index: some upstreams change an item's id in mid-stream.
# [R3] encrypted_content counts in output_item.done only; reasoning alone, without what followed
#      it, is refused.
# [R4] Custom tools take raw text: elsewhere they are functions with one text, `input`.
# [R5] A namespace's tools are called by name and namespace: elsewhere by `namespace__name`.

HOSTED_TOOLS = ("web_search", "file_search", "code_interpreter", "image_generation", "mcp",
                "computer", "programmatic_tool_calling", "tool_search")     # prefixes
SHELL_TOOLS = {     # tools that Responses clients run themselves, known by their type only
    "local_shell": {"command": {"type": "array", "items": {"type": "string"}},
                    "working_directory": {"type": "string"}, "timeout_ms": {"type": "integer"}},
    "shell": {"commands": {"type": "array", "items": {"type": "string"}},
              "timeout_ms": {"type": "integer"}, "max_output_length": {"type": "integer"}},
    "apply_patch": {"type": {"type": "string",
                             "enum": ["create_file", "update_file", "delete_file"]},
                    "path": {"type": "string"}, "diff": {"type": "string"}},
}
_SHELL_TEXTS = {"local_shell": "Runs a command, given as a list of words, and tells its output.",
                "shell": "Runs shell commands and tells their output.",
                "apply_patch": "Creates, updates (by a V4A diff) or deletes one file."}
_INPUT_SCHEMA = {"type": "object", "properties": {"input": {"type": "string"}},
                 "required": ["input"]}


class ClientTool(NamedTuple):
    """What a tool was to its client: how a call of it is told."""
    kind: str               # function, custom, local_shell, shell, apply_patch, tool_search
    name: str
    namespace: str = ""


def _custom_text(row: Mapping) -> str:
    """The description of a freeform tool, its grammar included [R4]."""
    text = str(row.get("description") or "")
    told = object_of(row.get("format"))
    told = object_of(told.get("grammar")) or told
    if told.get("definition"):
        text += f"\nThe text must follow this {told.get('syntax')} grammar:\n{told['definition']}"
    return text + "\nGive the raw text as `input`."


def openai_name(name: str, namespace: str = "") -> str:
    """The one name that other services know a tool by [R5]."""
    return f"{namespace}__{name}" if namespace and not name.startswith("mcp__") else name


def _named(row: Mapping) -> tuple[str, str]:
    inner = object_of(row.get(str(row.get("type")))) or row
    return str(inner.get("name") or row.get("type") or ""), str(row.get("namespace") or "")


class _Tools:
    """The tools of one request: `kept` by the name that upstreams see, `kinds` what they were, and
    the `hosted` ones that only OpenAI runs."""

    def __init__(self) -> None:
        self.kept: dict[str, Tool] = {}
        self.kinds: dict[str, ClientTool] = {}
        self.hosted: dict[str, dict] = {}

    def add(self, rows: Any, path: str, namespace: str = "") -> None:
        made = getattr(rows, "made", ())
        for position, row in enumerate(list_at(rows, path)):
            known = made[position] if position < len(made) else None
            if known is not None and known[0] is SHELL_TOOLS:
                self._keep(*known[1])
                continue
            found = self._add(dict_at(row, f"{path}.{position}"), f"{path}.{position}", namespace)
            if found and position < len(made):
                found = replace(found[0], kept={}), found[1]
                made[position] = SHELL_TOOLS, found
                self._keep(*found)

    def _add(self, row: dict, path: str, namespace: str) -> tuple[Tool, ClientTool] | None:
        """What was kept of a row that tells one tool."""
        kind = str(row.get("type") or "function")
        inner = row.get(kind)
        row = {**row, **inner} if isinstance(inner, dict) and kind in ("function",
                                                                       "custom") else row
        if kind == "namespace":
            self.add(row.get("tools") or [], path + ".tools", text_at(row.get("name"), path))
        elif kind in SHELL_TOOLS or kind.startswith("computer_use") or (
                kind == "tool_search" and row.get("execution") == "client"):
            schema = {"type": "object", "properties": SHELL_TOOLS.get(kind) or object_of(
                object_of(row.get("parameters")).get("properties"))}
            return self._keep(Tool(kind, str(row.get("description") or _SHELL_TEXTS.get(kind, "")),
                                   schema), ClientTool(kind, kind))
        elif kind.startswith(HOSTED_TOOLS):
            self.hosted[kind] = row
        else:
            name = text_at(row.get("name"), path + ".name")
            if not name:
                raise invalid(path + ".name", "a name is required")
            if kind == "custom" and "input_schema" not in row:
                return self._keep(Tool(name, _custom_text(row), _INPUT_SCHEMA),
                                  ClientTool("custom", name, namespace))
            schema = row.get("parameters") or row.get("input_schema") or {}
            return self._keep(Tool(name, str(row.get("description") or ""),
                                   dict_at(schema, path + ".parameters"),
                                   row.get("strict") is True),
                              ClientTool("function", name, namespace))
        return None

    def _keep(self, tool: Tool, told: ClientTool) -> tuple[Tool, ClientTool]:
        name = openai_name(told.name, told.namespace)
        # of two, a tool of that very name is meant first [R5]
        if not (told.namespace and name in self.kinds and not self.kinds[name].namespace):
            self.kept[name], self.kinds[name] = replace(tool, name=name), told
        return tool, told

    def choose(self, choice: Any) -> tuple[tuple, tuple]:
        """(tools, tool_choice) for a `tool_choice` of either dialect."""
        tools = tuple(self.kept.values())
        if choice is None or isinstance(choice, str):
            mode = {"required": "any", None: "auto"}.get(choice, choice)
            if mode not in ("auto", "any", "none"):
                raise invalid("tool_choice", "auto, required, none or a tool is required")
            return tools, (mode, "")
        row = dict_at(choice, "tool_choice")
        kind = str(row.get("type") or "function")
        row = {**row, **object_of(row.get(kind))}
        if kind in ("auto", "any", "none") and "name" not in row:       # Anthropic's, of editors
            return tools, (kind, "")
        if kind == "allowed_tools":
            named = {openai_name(*_named(t)) for t in objects_of(row.get("tools"))}
            mode = "any" if row.get("mode") == "required" else "auto"
            return tuple(t for t in tools if t.name in named), (mode, "")
        if kind.startswith(HOSTED_TOOLS):
            if kind not in self.hosted or kind.startswith("web_search") and not tools:
                return tools, ("auto", "")
            raise invalid("tool_choice", f"{kind} is run by OpenAI's own service only")
        name = openai_name(*_named(row)) if kind not in SHELL_TOOLS else kind
        if name not in self.kept:
            raise invalid("tool_choice", f"{name!r} is not among the tools")
        return tools, ("tool", name)

    def search_wish(self) -> SearchWish | None:
        """A search of the web is left to requests that want nothing else: see SearchWish."""
        row = next((row for kind, row in self.hosted.items() if kind.startswith("web_search")
                    and row.get("external_web_access") is not False), None)
        if row is None or self.kept:
            return None
        allowed = object_of(row.get("filters")).get("allowed_domains")
        return SearchWish("web_search", tuple(filter(None, map(str, allowed)))
                          if isinstance(allowed, list) else ())


def freeform_text(arguments: str) -> str:
    """The text that the arguments of a freeform call hold."""
    with contextlib.suppress(ValueError, RecursionError):       # no JSON: the text itself
        value = json.loads(arguments)
        if isinstance(value, dict):
            text = value.get("input", value if value else "")
            return text if isinstance(text, str) else json_encode(text)
    return arguments


class InputText:
    """The text of a freeform call, taken out of its JSON (`{"input": "…"}`) as that comes."""
    _BEGIN = re.compile(r'\s*\{\s*"input"\s*:\s*"')
    _PART = re.compile(r'(?:[^"\\]|\\(?:[^u]|u[0-9a-fA-F]{4}))*')

    def __init__(self) -> None:
        self._raw, self._is_inside, self.text = "", False, ""

    def feed(self, piece: str) -> str:
        """What can be told of the text by now and was not told before."""
        self._raw += piece
        if not self._is_inside:
            match = self._BEGIN.match(self._raw)
            if not match:
                return ""
            self._is_inside, self._raw = True, self._raw[match.end():]
        part = self._PART.match(self._raw)[0]
        half = re.search(r"\\u[dD][89abAB][0-9a-fA-F]{2}\Z", part)      # of a pair
        part = part[:half.start()] if half else part
        self._raw = self._raw[len(part):]
        said = json.loads(f'"{part}"', strict=False)
        self.text += said
        return said

    def end(self) -> str:
        """The rest, where a model wrote something else than was asked of it."""
        rest = "" if self._is_inside else freeform_text(self._raw)
        self.text += rest
        return rest


def openai_arguments(value: Any) -> dict:
    """The arguments of a call, which are told as JSON in a text; what is no object counts for
    none."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):       # no JSON
            value = json.loads(value, parse_float=finite, parse_constant=refuse_constant)
    if not isinstance(value, dict) or json_depth_exceeds(value):
        return {}
    return value


# Content of a message in either dialect

def _file_part(row: Mapping, path: str, reading: Any) -> tuple:
    row = {**row, **object_of(row.get("file"))}
    name = str(row.get("filename") or "")
    if row.get("file_url"):
        return (media_of_url(row["file_url"], "application/pdf", path + ".file_url", name),)
    if row.get("file_data") is None:
        raise invalid(path, "a file that was uploaded elsewhere is not known here; send file_data")
    data = text_at(row["file_data"], path + ".file_data")
    if ":" in data[:20] and not data.startswith("data:"):       # a URL, to those who take one
        return (media_of_url(data, "application/pdf", path + ".file_data", name),)
    kind = re.match(r"data:text/[^,]*;base64,", data)
    if kind:
        try:
            text = base64.b64decode(data[kind.end():]).decode("utf-8")
        except ValueError as err:
            raise invalid(path + ".file_data", "base64 of UTF-8 text is required") from err
        return (Text(f"{name}\n{text}" if name else text),)
    is_pdf = not data.startswith("data:") and name.lower().endswith(".pdf")
    return (media_of_data(data, "application/pdf" if is_pdf else "", path + ".file_data", name),)


def _image_part(row: Mapping, path: str, reading: Any) -> tuple:
    source = row.get("image_url")
    source = source.get("url") if isinstance(source, dict) else source
    if source is None:
        raise invalid(path, "an image that was uploaded elsewhere is not known here; send its data")
    path += ".image_url"
    return (media_of_data(source, "", path) if text_at(source, path).startswith("data:")
            else media_of_url(source, "image/*", path),)


def _audio_part(row: Mapping, path: str, reading: Any) -> tuple:
    sound = dict_at(row.get("input_audio"), path + ".input_audio")
    kind = AUDIO_TYPES.get(str(sound.get("format")), "")
    return (media_of_data(sound.get("data"), kind, path + ".input_audio.data"),)


def _text_part(row: Mapping, path: str, reading: Any) -> tuple:
    return (Text(text_at(row.get("text"), path + ".text")),)


OPENAI_PARTS: dict[str, Callable[[Mapping, str, Any], tuple]] = {
    **dict.fromkeys(("text", "input_text", "output_text", "summary_text", "reasoning_text"),
                    _text_part),
    **dict.fromkeys(("image_url", "input_image"), _image_part),
    **dict.fromkeys(("file", "input_file"), _file_part), "input_audio": _audio_part,
    "thinking": lambda row, path, _: (Thinking(
        text_at(row.get("thinking") or "", path + ".thinking"), str(row.get("signature") or "")),),
    "redacted_thinking": lambda row, path, _: (),
    "refusal": lambda row, path, _: (Text(text_at(row.get("refusal"), path + ".refusal")),),
    # some clients write Anthropic's blocks for models that are called claude
    "image": lambda row, path, _: (media_of_data(
        object_of(row.get("source")).get("data"), object_of(row.get("source")).get("media_type"),
        path + ".source.data"),),
    "tool_use": lambda row, path, _: (ToolCall(
        text_at(row.get("id"), path + ".id"), text_at(row.get("name"), path + ".name"),
        openai_arguments(row.get("input"))),),
    "tool_result": lambda row, path, read: (ToolResult(
        text_at(row.get("tool_use_id"), path + ".tool_use_id"),
        tuple(b for b in read(row.get("content"), path + ".content")
              if isinstance(b, (Text, Media))), row.get("is_error") is True),),
}


def openai_content(content: Any, path: str) -> tuple:
    """Neutral blocks of a `content`: null, a text, or a list of parts."""
    if content is None:
        return ()
    if isinstance(content, str):
        return (Text(content),)
    out: list = []
    for position, row in enumerate(list_at(content, path)):
        where = f"{path}.{position}"
        kind = dict_at(row, where).get("type")
        if not isinstance(kind, str) or kind not in OPENAI_PARTS:
            raise invalid(where + ".type", f"{str(kind)[:40]!r} is not supported")
        out.extend(OPENAI_PARTS[kind](row, where, openai_content))
    return tuple(out)


def openai_blocks(content: Any, path: str, is_model: bool = False) -> tuple:
    """The blocks that may stand on a side: calls are a model's, results and media a person's."""
    blocks = openai_content(content, path)
    if not is_model and any(isinstance(b, ToolCall) for b in blocks):
        raise invalid(path.rpartition(".")[0] + ".role", "assistant is required beside a tool_use")
    return tuple(b for b in blocks
                 if isinstance(b, Text) or isinstance(b, (ToolCall, Thinking)) == is_model)


def _openai_effort(body: Mapping) -> ThinkingWish:
    """What OpenAI's, Anthropic's, OpenRouter's and Qwen's fields say about thinking."""
    told, typed = object_of(body.get("reasoning")), object_of(body.get("thinking"))
    template = object_of(body.get("chat_template_kwargs"))
    effort = body.get("reasoning_effort") or told.get("effort") or ""
    if not isinstance(effort, str):
        raise invalid("reasoning_effort", "a string is required")
    budget = next((n for n in (told.get("max_tokens"), typed.get("budget_tokens"),
                               body.get("thinking_budget")) if type(n) is int and n > 0), None)
    switch = [v for v in (body.get("enable_thinking"), template.get("enable_thinking"),
                          told.get("enabled")) if isinstance(v, bool)]
    is_off = typed.get("type") == "disabled" or effort.lower() in ("none", "off") or False in switch
    is_on = bool(effort or budget or switch or typed.get("type"))
    shows = told.get("exclude") is not True
    if is_off or is_on:
        return ThinkingWish(not is_off, budget, "" if is_off else effort.lower(), shows=shows)
    return ThinkingWish(None, None, "auto", shows=shows)


def _openai_format(wanted: Any, path: str) -> tuple[dict | None, dict]:
    """(the schema, its name and strictness) for a `response_format` or `text.format`."""
    row = dict_at({"type": "text"} if wanted is None else wanted, path)
    kind = row.get("type")
    if kind in ("text", "json_object"):
        return (None if kind == "text" else ANY_OBJECT), {}
    if kind != "json_schema":
        raise invalid(path + ".type", "text, json_object or json_schema is required")
    row = object_of(row.get("json_schema")) or row
    return dict_at(row.get("schema"), path + ".schema"), {
        "schema_name": str(row.get("name") or "answer"), "schema_strict": row.get("strict") is True}


def _openai_limit(body: Mapping, *names: str) -> int | None:
    for name in names:
        value = body.get(name)
        if value is not None:
            if type(value) is not int or value < 1:
                raise invalid(name, "a whole number above zero is required")
            return value
    return None


def _openai_fields(body: Mapping, model: str, tools: _Tools, wanted: tuple) -> dict:
    """The fields of the Request that Chat and Responses write alike.  `wanted` is the wish for a
    format and where it stands."""
    kept, choice = tools.choose(body.get("tool_choice"))
    schema, named = _openai_format(*wanted)
    more = {n: number_at(body, n, *bounds) if bounds else text_at(body[n], n)
            for n, bounds in MORE_FIELDS.items() if body.get(n) is not None}
    _, wish = model_variant(model)
    asked = _openai_effort(body)
    search = tools.search_wish()
    left_out = [kind for kind in tools.hosted if not (search and kind.startswith("web_search"))]
    return {
        "tools": kept, "tool_choice": choice, "one_call": body.get("parallel_tool_calls") is False,
        "temperature": number_at(body, "temperature", 0, 2),
        "top_p": number_at(body, "top_p", 0, 1), "thinking": asked if wish is None else replace(
            wish, shows=asked.shows, shows_text=asked.shows_text),
        "more": {**more, **named}, "json_schema": schema, "search": search,
        "left_out": tuple(left_out)}


def _openai_request(dialect: str, body: dict, headers: Mapping[str, str], raw: bytes,
                    fields: Callable[[dict, str], dict], ext: dict) -> Request:
    """The Request of a body, whose fields that other dialects need `fields` reads."""
    model, is_streaming = model_at(body), flag_at(body, "stream")
    found = fields_for_others(lambda: fields(body, model), raw)
    return Request(
        model=model, wanted=model_variant(model)[0], session=session_key(body, headers),
        agent=headers.get("x-openai-subagent", ""), is_streaming=is_streaming,
        native=Native(dialect, raw) if raw else None, dialect=dialect,
        ext={**ext, **found.pop("ext", {})}, **found)


# Chat: requests of clients

def chat_thought(row: Mapping) -> str:
    """What a message or a delta tells of thinking: in DeepSeek's, vLLM's or OpenRouter's field."""
    told = row.get("reasoning_content") or row.get("reasoning")
    return told if isinstance(told, str) else "".join(
        str(d.get("text") or d.get("summary") or "") for d in objects_of(
            row.get("reasoning_details")))


def _chat_call(row: Mapping, path: str) -> ToolCall:
    inner = dict_at(row.get("custom") or row.get("function"), path)
    name = openai_name(text_at(inner.get("name"), path + ".name"))
    arguments = ({"input": str(inner.get("input") or "")} if row.get("custom")
                 else openai_arguments(inner.get("arguments")))
    return ToolCall(text_at(row.get("id"), path + ".id"), name, arguments)


def _chat_turns(messages: Any) -> tuple[tuple, tuple]:
    """(system texts, turns).  A system message behind the first turn keeps its place."""
    system: list[str] = []
    turns: list[Turn] = []
    called: dict[str, str] = {}         # name -> id, for the old kind of calls
    for position, message in enumerate(list_at(messages, "messages")):
        path = f"messages.{position}"
        role = dict_at(message, path).get("role")
        if role not in ("tool", "function", "user", "assistant", "system", "developer"):
            raise invalid(path + ".role", "system, developer, user, assistant or tool is required")
        blocks = openai_blocks(message.get("content"), path + ".content", role == "assistant")
        if role in ("system", "developer"):
            if turns:
                turns.append(Turn("system", blocks))
            else:
                system += [b.text for b in blocks if isinstance(b, Text)]
        elif role in ("tool", "function"):
            call_id = (text_at(message.get("tool_call_id"), path + ".tool_call_id")
                       if role == "tool" else called.get(str(message.get("name")), "call_0"))
            blocks = tuple(b for b in blocks if not isinstance(b, ToolResult))
            turns.append(Turn("user", (ToolResult(call_id, blocks),)))
        elif role == "user":
            turns.append(Turn("user", blocks))
        else:
            calls = tuple(_chat_call(dict_at(row, path), f"{path}.tool_calls.{i}")
                          for i, row in enumerate(list_at(message.get("tool_calls") or [],
                                                          path + ".tool_calls")))
            old = message.get("function_call")
            if isinstance(old, dict):
                call_id = called[str(old.get("name"))] = f"call_{position}"
                calls += (_chat_call({"id": call_id, "function": old}, path + ".function_call"),)
            told = message.get("refusal")
            blocks += (Text(told),) if isinstance(told, str) and not blocks else ()
            thought = chat_thought(message)
            turns.append(Turn("assistant", (Thinking(thought, ""),) * bool(thought)
                              + blocks + calls))
    if not turns and not system:
        raise invalid("messages", "at least one message is required")
    return tuple(system), tuple(turns)


def _chat_fields(body: dict, model: str) -> dict:
    if body.get("n") not in (None, 1):
        raise invalid("n", "more than one choice is not supported by this model's provider")
    if any(m != "text" for m in list_at(body.get("modalities") or [], "modalities")):
        raise invalid("modalities", "only text is supported by this model's provider")
    tools = _Tools()
    old = [{"type": "function", "function": f} for f in objects_of(body.get("functions"))]
    rows = list_at(body.get("tools") or [], "tools")
    tools.add(rows + old if old else rows, "tools")
    if isinstance(body.get("web_search_options"), dict):
        tools.hosted["web_search"] = {}
    choice = body.get("function_call", body.get("tool_choice"))
    system, turns = _chat_turns(body.get("messages"))
    stop = body.get("stop")
    stops = [stop] if isinstance(stop, str) else list_at(stop or [], "stop")
    top_k = number_at(body, "top_k", 0, 1 << 31)
    return {
        **_openai_fields({**body, "tool_choice": choice}, model, tools,
                         (body.get("response_format"), "response_format")),
        "system": system, "turns": turns, "top_k": None if top_k is None else int(top_k),
        "max_tokens": _openai_limit(body, "max_completion_tokens", "max_tokens"),
        "stop_sequences": tuple(text_at(s, f"stop.{i}") for i, s in enumerate(stops)),
        "ext": {"tools": tools.kinds}}


def _told_output(value: Any, path: str) -> tuple:
    """The blocks of a call's output: a text, parts, or what shells tell."""
    if isinstance(value, list) and any("type" not in row or "outcome" in row
                                       for row in objects_of(value)):
        return (Text("\n".join(
            f"{row.get('stdout') or ''}{row.get('stderr') or ''}"
            + (f"[exit code {code}]" if (code := object_of(row.get("outcome")).get("exit_code"))
               is not None else "[timeout]") for row in objects_of(value))),)
    if isinstance(value, dict):
        return (Text(json_encode(value)),)
    return tuple(b for b in openai_blocks(value, path) if not isinstance(b, ToolResult))


class _Items:
    """The items of an `input`, read into turns and tools."""

    def __init__(self, tools: _Tools):
        self.tools = tools
        self.system: list[str] = []
        self.turns: list[Turn] = []

    def read(self, value: Any) -> None:
        if isinstance(value, str):
            value = [{"role": "user", "content": value}]
        for position, item in enumerate(list_at(value, "input")):
            path = f"input.{position}"
            kind = str(dict_at(item, path).get("type") or "message")
            self._READERS.get(kind, _Items.opaque)(self, item, path)
        self.turns = self._joined()

    def _joined(self) -> list[Turn]:
        """The turns, what the model thinks, says and calls in a row being one: a thought alone
        would count for an empty turn."""
        out: list[Turn] = []
        for role, group in itertools.groupby(self.turns, lambda turn: turn.role):
            out += group if role != "assistant" else [
                Turn(role, tuple(b for turn in group for b in turn.blocks))]
        return out

    def message(self, item: dict, path: str) -> None:
        role = item.get("role")
        blocks = openai_blocks(item.get("content"), path + ".content", role == "assistant")
        if role in ("system", "developer"):
            if self.turns:
                self.turns.append(Turn("system", blocks))
            else:
                self.system += [b.text for b in blocks if isinstance(b, Text)]
        elif role in ("user", "assistant"):
            self.turns.append(Turn(role, blocks))
        else:
            raise invalid(path + ".role", "user, assistant, system or developer is required")

    def reasoning(self, item: dict, path: str) -> None:
        rows = objects_of(item.get("summary")) or objects_of(item.get("content"))
        text = "\n\n".join(str(row.get("text") or "") for row in rows)
        signature = item.get("encrypted_content")
        block = Thinking(text, signature if isinstance(signature, str) else "")
        self.turns.append(Turn("assistant", (block,)))

    def call(self, item: dict, path: str) -> None:
        kind = item["type"]
        word = kind[:-5]        # without _call
        if word in SHELL_TOOLS:
            inner = object_of(item.get("action") or item.get("operation"))
            name, arguments = word, {k: v for k, v in inner.items()
                                     if k in SHELL_TOOLS[word] and v is not None}
        else:
            name = text_at(item.get("name") or ("tool_search" if word == "tool_search" else None),
                           path + ".name")
            name = openai_name(name, str(item.get("namespace") or ""))
            arguments = ({"input": str(item.get("input") or "")} if word == "custom_tool"
                         else openai_arguments(item.get("arguments")))
        call_id = text_at(item.get("call_id") or item.get("id"), path + ".call_id")
        self.turns.append(Turn("assistant", (ToolCall(call_id, name, arguments),)))

    def output(self, item: dict, path: str) -> None:
        call_id = text_at(item.get("call_id") or item.get("id"), path + ".call_id")
        told = item.get("output", item.get("tools"))
        if item["type"] == "tool_search_output":
            self.tools.add(item.get("tools") or [], path + ".tools")
            told = "Loaded tools: " + ", ".join(str(t.get("name"))
                                                for t in objects_of(item.get("tools")))
        is_error = item.get("status") in ("failed", "incomplete")
        self.turns.append(Turn("user", (ToolResult(call_id, _told_output(
            told, path + ".output"), is_error),)))

    def more_tools(self, item: dict, path: str) -> None:
        self.tools.add(item.get("tools") or [], path + ".tools")

    def reference(self, item: dict, path: str) -> None:
        raise invalid(path, "items are not kept here; send them again, or previous_response_id")

    def searched(self, item: dict, path: str) -> None:
        query = object_of(item.get("action")).get("query")
        if query:
            self.turns.append(Turn("assistant", (Text(f"[searched the web for: {query}]"),)))

    def agent(self, item: dict, path: str) -> None:
        """What one of Codex's agents tells another; the text may stand as if it were encrypted."""
        texts = [str(row.get("text") or row.get("encrypted_content") or "")
                 for row in objects_of(item.get("content"))]
        who = f"[{item.get('author')} to {item.get('recipient')}]\n"
        self.turns.append(Turn("user", (Text(who + "\n".join(texts)),)))

    def opaque(self, item: dict, path: str) -> None:
        """Items of tools that OpenAI runs, and what it encrypted, mean nothing to others."""
        self.tools.hosted.setdefault(str(item.get("type")), {})

    _READERS = {
        "message": message, "reasoning": reasoning, "item_reference": reference,
        "additional_tools": more_tools, "web_search_call": searched,
        **dict.fromkeys(("function_call", "custom_tool_call", "local_shell_call", "shell_call",
                         "apply_patch_call", "tool_search_call"), call),
        **dict.fromkeys(("function_call_output", "custom_tool_call_output",
                         "local_shell_call_output", "shell_call_output",
                         "apply_patch_call_output", "tool_search_output"), output),
        "agent_message": agent,
    }


def responses_echo(body: Mapping) -> dict:
    """What a response says again of its request."""
    return {"instructions": body.get("instructions"),
            "max_output_tokens": body.get("max_output_tokens"),
            "max_tool_calls": body.get("max_tool_calls"),
            "metadata": object_of(body.get("metadata")),
            "parallel_tool_calls": body.get("parallel_tool_calls") is not False,
            "previous_response_id": body.get("previous_response_id"),
            "reasoning": {"effort": object_of(body.get("reasoning")).get("effort"),
                          "summary": object_of(body.get("reasoning")).get("summary")},
            "store": body.get("store") is not False, "temperature": body.get("temperature", 1),
            "text": object_of(body.get("text")) or {"format": {"type": "text"}},
            "tool_choice": body.get("tool_choice") or "auto", "tools": body.get("tools") or [],
            "top_p": body.get("top_p", 1), "truncation": body.get("truncation") or "disabled",
            "user": body.get("user")}


def _responses_fields(body: dict, model: str) -> dict:
    for name in ("background", "conversation", "prompt"):
        if body.get(name):
            raise invalid(name, "not supported by this model's provider")
    if body.get("previous_response_id"):
        raise ProxyError("no_response", "Previous response with id "
                         f"'{body['previous_response_id']}' not found.")
    tools = _Tools()
    tools.add(body.get("tools") or [], "tools")
    items = _Items(tools)
    items.read(body.get("input", []))
    system = body.get("instructions")
    system = (text_at(system, "instructions"),) if system else ()
    if not items.turns and not system and not items.system:
        raise invalid("input", "a text or at least one item is required")
    told = object_of(body.get("text"))
    include = body.get("include")
    fields = _openai_fields({**told, **body}, model, tools, (told.get("format"), "text.format"))
    thinking = fields["thinking"]
    encrypted = isinstance(include, list) and "reasoning.encrypted_content" in include
    # a thought comes back with its signature, which is void without the text it was made for
    shows = encrypted or bool(object_of(body.get("reasoning")).get("summary"))
    return {**fields, "system": system + tuple(items.system), "turns": tuple(items.turns),
            "max_tokens": _openai_limit(body, "max_output_tokens"),
            "thinking": replace(thinking, shows=True, shows_text=shows),
            "ext": {"tools": tools.kinds, "echo": responses_echo(body),
                    "encrypted": encrypted}}


def chat_parse_request(body: Any, headers: Mapping[str, str], raw: bytes = b"",
                       **_: Any) -> Request:
    """The neutral Request of a Chat body.  One in the shape of Responses, which some editors send
    here, is read as such and answered as Chat.  Raises ProxyError invalid_request."""
    body = dict_at(body, "body")
    ext = {"usage": object_of(body.get("stream_options")).get("include_usage") is True}
    if "messages" not in body and ("input" in body or "instructions" in body):
        request = _openai_request("chat", body, headers, b"", _responses_fields, ext)
        # what a response says again of its request, Chat does not
        return replace(request, ext={k: v for k, v in request.ext.items() if k != "echo"})
    return _openai_request("chat", body, headers, raw, _chat_fields, ext)


def _completion_fields(body: dict, model: str) -> dict:
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str):
        raise invalid("prompt", "one text is required")
    if body.get("n") not in (None, 1) or body.get("best_of") not in (None, 1):
        raise invalid("n", "more than one choice is not supported")
    suffix = body.get("suffix")
    text = prompt if not suffix else (
        "Write what stands at <HERE>, and nothing else: no fence, no explanation.\n"
        f"{prompt}<HERE>{text_at(suffix, 'suffix')}")
    rest = {k: v for k, v in body.items() if k not in ("prompt", "tools", "tool_choice")}
    fields = _chat_fields({**rest, "messages": [{"role": "user", "content": text}]}, model)
    return {**fields, "thinking": ThinkingWish(False),
            "ext": {"prompt": prompt if body.get("echo") is True else ""}}


def completion_parse_request(body: Any, headers: Mapping[str, str], **_: Any) -> Request:
    """The neutral Request of an old Completions body: the prompt is a turn of the user."""
    body = dict_at(body, "body")
    ext = {"usage": object_of(body.get("stream_options")).get("include_usage") is True}
    return _openai_request("chat", body, headers, b"", _completion_fields, ext)


# Chat: answers to clients

@dataclass
class ChatAnswer:
    """What is remembered between the deltas of one answer.  `kinds` tells what tools were to the
    client; `before` and `after` stand around every delta."""
    model: str
    created: int
    wants_usage: bool = False
    kinds: Mapping[str, ClientTool] = field(default_factory=dict)
    id: str = field(default_factory=lambda: new_id("chatcmpl-"))
    begun: bool = False
    calls: int = 0
    open_kind: Kind | None = None
    custom: InputText | None = None     # of the open call
    letters: int = 0                    # of the answer's text so far, for citations
    echo: str | None = None             # of an old completion: its prompt
    before: str = ""
    after: str = ""

    def __post_init__(self) -> None:
        kind = "chat.completion.chunk" if self.echo is None else "text_completion"
        word = '"delta":' if self.echo is None else '"text":'
        self.id = self.id if self.echo is None else self.id[4:]     # cmpl-...
        self.before = (f'data: {{"id":{quote(self.id)},"object":"{kind}","created":{self.created},'
                       f'"model":{quote(self.model)},"choices":[{{"index":0,{word}')
        usage = ',"usage":null' if self.wants_usage else ""
        self.after = f',"logprobs":null,"finish_reason":null}}]{usage}}}\n\n'

    def chunk(self, delta: str) -> str:
        return self.before + delta + self.after


def chat_answer(request: Request, now: int) -> ChatAnswer:
    return ChatAnswer(request.model, now, request.ext.get("usage", False),
                      request.ext.get("tools", {}), echo=request.ext.get("prompt"))


def chat_usage(usage: Usage) -> dict:
    prompt = usage.input_tokens + usage.cached_tokens + usage.written_tokens
    return {"prompt_tokens": prompt, "completion_tokens": usage.output_tokens,
            "total_tokens": prompt + usage.output_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.cached_tokens,
                                      "cache_write_tokens": usage.written_tokens},
            "completion_tokens_details": {"reasoning_tokens": usage.thinking_tokens}}


def _chat_begin(state: ChatAnswer, delta: Begin) -> str:
    if state.begun:
        return ""
    state.begun = True
    if state.echo is not None:
        return state.chunk(quote(state.echo)) if state.echo else ""
    return state.chunk('{"role":"assistant","content":""}')


def _call_shape(told: ClientTool, call_id: str, text: str) -> dict:
    """A call as Chat tells it, whole or at its beginning."""
    if told.kind == "custom":
        return {"id": call_id, "type": "custom", "custom": {"name": told.name, "input": text}}
    return {"id": call_id, "type": "function", "function": {"name": told.name, "arguments": text}}


def _chat_start(state: ChatAnswer, delta: BlockStart) -> str:
    state.open_kind = delta.kind
    if delta.kind is not Kind.CALL or state.echo is not None:
        return ""
    told = state.kinds.get(delta.name) or ClientTool("function", delta.name)
    state.custom = InputText() if told.kind == "custom" else None
    row = {"index": state.calls, **_call_shape(told, delta.id, "")}      # [C1]
    state.calls += 1
    return state.chunk(json_encode({"tool_calls": [row]}))


def _chat_arguments(state: ChatAnswer, text: str) -> str:
    word, key = "function", "arguments"
    if state.custom is not None:
        text, word, key = state.custom.feed(text), "custom", "input"
    if not text:
        return ""
    row = f'{{"index":{state.calls - 1},"{word}":{{"{key}":{quote(text)}}}}}'
    return state.chunk(f'{{"tool_calls":[{row}]}}')


def url_citation(told: Mapping, end: int) -> dict:
    """A source of a text that ends at `end`; {} for a citation of another kind."""
    if "url" not in told:
        return {}
    text = str(told.get("text") or told.get("cited_text") or "")
    return {"url": told["url"], "title": told.get("title") or "",
            "start_index": max(0, end - len(text)), "end_index": end}


def _chat_piece(state: ChatAnswer, delta: Piece) -> str:
    kind = delta.kind
    if kind is Kind.TEXT:
        state.letters += len(delta.text)
        text = quote(delta.text)
        return state.chunk(text if state.echo is not None else f'{{"content":{text}}}')
    if state.echo is not None:
        return ""
    if kind is Kind.THINKING:
        return state.chunk(f'{{"reasoning_content":{quote(delta.text)}}}')
    if kind is Kind.ARGUMENTS and state.open_kind is Kind.CALL:
        return _chat_arguments(state, delta.text)
    if kind is Kind.CITATION:
        note = url_citation(json.loads(delta.text), state.letters)
        row = {"type": "url_citation", "url_citation": note}
        return state.chunk(json_encode({"annotations": [row]})) if note else ""
    return ""                   # signatures: the client has no place for them


def _chat_run(state: ChatAnswer, delta: Run) -> str:
    is_text = delta.kind is Kind.TEXT
    state.letters += len(delta.text) if is_text else 0
    if state.echo is not None:
        return "".join([state.chunk(f'"{raw}"') for raw in delta.raw]) if is_text else ""
    before = f'{state.before}{{"{"content" if is_text else "reasoning_content"}":"'
    return before + ('"}' + state.after + before).join(delta.raw) + '"}' + state.after


def _chat_end(state: ChatAnswer, delta: BlockEnd) -> str:
    rest = state.custom.end() if state.custom is not None else ""
    state.open_kind, state.custom = None, None
    if not rest:
        return ""
    row = {"index": state.calls - 1, "custom": {"input": rest}}
    return state.chunk(json_encode({"tool_calls": [row]}))


def _chat_finish(state: ChatAnswer, delta: Finish) -> str:
    word = STOP_WORDS[delta.stop].chat
    after = state.after.replace('"finish_reason":null', f'"finish_reason":"{word}"', 1)
    out = state.before + ("{}" if state.echo is None else '""') + after
    if state.wants_usage:       # [C2]
        head = state.before[:state.before.index('"choices":')]
        out += f'{head}"choices":[],"usage":{json_encode(chat_usage(delta.usage))}}}\n\n'
    return out + "data: [DONE]\n\n"


OPENAI_ERRORS = {       # Anthropic's type, or a kind of ERRORS -> OpenAI's type and code
    "invalid_request_error": ("invalid_request_error", None),
    "request_too_large": ("invalid_request_error", "request_too_large"),
    "authentication_error": ("authentication_error", "invalid_api_key"),
    "permission_error": ("permission_error", None),
    "not_found_error": ("invalid_request_error", "model_not_found"),
    "rate_limit_error": ("rate_limit_error", "rate_limit_exceeded"),
    "overloaded_error": ("service_unavailable_error", "server_is_overloaded"),
    "timeout_error": ("server_error", "timeout"), "api_error": ("server_error", "server_error"),
    "too_long": ("invalid_request_error", "context_length_exceeded"),
    "no_response": ("invalid_request_error", "previous_response_not_found"),
    "exhausted": ("usage_limit_reached", "rate_limit_exceeded"),
    "quota": ("usage_limit_reached", "insufficient_quota"),
}


def openai_render_error(error: ProxyError, request_id: str) -> dict:
    kind, code = OPENAI_ERRORS.get(error.kind) or OPENAI_ERRORS[error.rule.type]
    body = {"message": error.message, "type": kind, "param": None, "code": code}
    if error.kind == "not_found" and not error.message.startswith("model: "):
        body["code"] = None         # a path, or an answer that is gone
    named = re.match(r"([a-z_]+(?:\.[\w.]+)?): ", error.message)
    if error.kind == "invalid_request" and named:
        body["param"] = named[1]
    if kind == "usage_limit_reached" and error.retry_after_s is not None:
        body.update(plan_type=None, resets_in_seconds=int(error.retry_after_s + 0.999))
        if error.retry_at:      # Codex shows this one
            body["resets_at"] = int(error.retry_at + 0.999)
    return {"error": {**body, **error.details}}


CHAT_EVENTS: dict[type, Callable[[ChatAnswer, Any], str]] = {
    Piece: _chat_piece, Run: _chat_run, Begin: _chat_begin, BlockStart: _chat_start,
    BlockEnd: _chat_end, Finish: _chat_finish,      # [C3]
    Fault: lambda state, delta: f"data: {json_encode(openai_render_error(delta.error, ''))}\n\n",
}


def chat_render_delta(state: ChatAnswer, delta: Any) -> str:
    """One neutral delta -> the text of its chunks, ASCII."""
    return CHAT_EVENTS[type(delta)](state, delta)


def comment_keep_alive(state: Any, is_beat: bool) -> str:
    return ": keep-alive\n\n"


def chat_render_reply(state: ChatAnswer, reply: Reply) -> dict:
    """The completion object of a folded answer."""
    text = "".join(b.text for b in reply.blocks if isinstance(b, Text))
    row: dict = {"index": 0, "logprobs": None, "finish_reason": STOP_WORDS[reply.finish.stop].chat}
    head = {"id": state.id, "created": state.created, "model": state.model}
    if state.echo is not None:
        return {**head, "object": "text_completion", "choices": [
            {**row, "text": state.echo + text}], "usage": chat_usage(reply.finish.usage)}
    message: dict = {"role": "assistant", "content": text, "refusal": None}
    thought = "".join(b.text for b in reply.blocks if isinstance(b, Thinking))
    if thought:
        message["reasoning_content"] = thought
    calls, end, notes = [], 0, []
    for block in reply.blocks:
        if isinstance(block, ToolCall):
            told = state.kinds.get(block.name) or ClientTool("function", block.name)
            arguments = json_encode(block.arguments)
            calls.append(_call_shape(told, block.id, freeform_text(arguments)
                                     if told.kind == "custom" else arguments))
        end += len(block.text) if isinstance(block, Text) else 0
        notes += filter(None, (url_citation(c, end) for c in getattr(block, "citations", ())))
    if calls:
        message.update(content=text or None, tool_calls=calls)
    if reply.finish.stop is Stop.REFUSAL and not text:      # what was said stays where it was said
        message["refusal"] = reply.finish.explanation or "refused"
    if notes:
        message["annotations"] = [{"type": "url_citation", "url_citation": n} for n in notes]
    return {**head, "object": "chat.completion", "choices": [{**row, "message": message}],
            "usage": chat_usage(reply.finish.usage), "system_fingerprint": None,
            "service_tier": "default"}


# Upstreams of either dialect: calls, thoughts and what all requests share

class _Call:
    """A call of an upstream as it comes in pieces."""
    __slots__ = ("id", "name", "parts", "sent", "is_open", "is_closed", "looked_at", "whole")

    def __init__(self, call_id: str, name: str):
        self.id, self.name, self.parts = call_id, name, []
        self.sent, self.is_open, self.is_closed, self.looked_at = 0, False, False, -1
        self.whole = False

    def is_whole(self) -> bool:
        """Whether its arguments are complete JSON; looked at once for each length."""
        if self.looked_at != len(self.parts):
            self.looked_at = len(self.parts)
            self.whole = bool(self.parts) and self.parts[-1].rstrip().endswith("}") and is_json(
                "".join(self.parts))
        return self.whole


class CallQueue:
    """Calls that an upstream may interleave, one after the other: the first streams, those behind
    it wait for its end."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []

    def pieces(self, is_end: bool = False) -> list[tuple[Kind, Any]]:
        """What can be told by now; all of it at the end."""
        out: list[tuple[Kind, Any]] = []
        while self.calls:
            call, is_last = self.calls[0], len(self.calls) == 1
            if not call.is_open and (call.parts or call.is_closed or is_end):
                call.is_open = True
                out.append((Kind.CALL, ToolCall(call.id, call.name, None)))
            if call.is_open and call.sent < len(call.parts):
                out.append((Kind.ARGUMENTS, "".join(call.parts[call.sent:])))
                call.sent = len(call.parts)
            if not (is_end or call.is_closed or not is_last and call.is_whole()):
                break
            if not call.parts:
                out.append((Kind.ARGUMENTS, "{}"))
            out.append((Kind.BLOCK_END, None))
            self.calls.pop(0)
        return out


class ThinkTags:
    """Text of models that think inside `<think>` at the beginning of their answer."""

    def __init__(self) -> None:
        self._held, self._state = "", "start"

    def feed(self, text: str) -> list[tuple[Kind, Any]]:
        if self._state == "over":
            return [(Kind.TEXT, text)]
        text, self._held = self._held + text, ""
        if self._state == "start":
            begun = text.lstrip()
            if begun.startswith("<think>"):
                self._state, text = "inside", begun[7:]
            elif "<think>".startswith(begun):
                self._held = text
                return []
            else:
                self._state = "over"
                return [(Kind.TEXT, text)]
        thought, mark, rest = text.partition("</think>")
        if mark:
            self._state = "over"
            return [(Kind.THINKING, thought), (Kind.SIGNATURE, ("-", True)),
                    (Kind.TEXT, rest.lstrip())]
        keep = next((n for n in range(7, 0, -1) if text.endswith("</think>"[:n])), 0)
        self._held = text[len(text) - keep:]
        return [(Kind.THINKING, text[:len(text) - keep])]

    def end(self) -> list[tuple[Kind, Any]]:
        held, self._held = self._held, ""
        kind = Kind.THINKING if self._state == "inside" else Kind.TEXT
        return [(kind, held)] if held else []


def _openai_tools(request: Request, repairs: frozenset, quirks: Iterable[str],
                  told: Callable[[dict], dict]) -> dict:
    """`tools`, `tool_choice`, `parallel_tool_calls`; `told` writes a function as its dialect does,
    or the name of one."""
    if not request.tools:
        return {}
    fields: dict = {"tools": []}
    for tool in request.tools:
        schema = tool.schema
        if schema.get("type") != "object":
            schema = {"properties": {}, **schema, "type": "object"}
        if "core_schemas" in repairs:
            schema = core_schema(clean_schema(tool.schema, False))
        if "bare_schemas" in repairs:
            schema = {"type": "object", "properties": {}}
        fields["tools"].append(told({"name": tool_name(tool.name), "parameters": schema,
                                     "description": tool.description, "strict": tool.is_strict}))
    mode, name = request.tool_choice
    if mode != "auto" and not ("tool_choice_basic" in quirks and mode in ("any", "tool")):
        fields["tool_choice"] = {"any": "required", "none": "none"}.get(mode) or told(
            {"name": tool_name(name)})
    if request.one_call and "no_parallel_flag" not in quirks:
        fields["parallel_tool_calls"] = False
    return fields


def _openai_sampling(request: Request, *more: str) -> dict:
    """The fields that are called the same here, where they were given."""
    given = {"temperature": request.temperature, "top_p": request.top_p}
    return {**{name: value for name, value in given.items() if value is not None},
            **{name: request.more[name] for name in more if name in request.more}}


def wanted_effort(wish: ThinkingWish) -> str:
    """The effort that a wish stands for, "" where the model is to decide."""
    if wish.is_on is False:
        return "none"
    if wish.budget_tokens is not None:
        return next((name for most, name in LEVEL_BY_BUDGET if wish.budget_tokens <= most), "high")
    return "" if wish.effort == "auto" else wish.effort


THINKING_STYLES: dict[str, Callable[[str, ThinkingWish], dict]] = {     # quirk -> fields of a body
    "thinking_type": lambda effort, wish: {
        "thinking": {"type": "disabled" if effort == "none" else "enabled"}},
    "enable_thinking": lambda effort, wish: {
        "enable_thinking": effort != "none",
        **({"thinking_budget": wish.budget_tokens} if wish.budget_tokens else {})},
    "template_thinking": lambda effort, wish: {
        "chat_template_kwargs": {"enable_thinking": effort != "none"}},
    "reasoning_object": lambda effort, wish: {
        "reasoning": {"max_tokens": wish.budget_tokens} if wish.budget_tokens else
        {"enabled": False} if effort == "none" else {"effort": effort} if effort else
        {"enabled": True}},
    "no_effort": lambda effort, wish: {},
}


def without_refused(body: dict, repairs: Iterable[str]) -> dict:
    """`body` without the parameters that its upstream refused to know; `max_tokens` may have been
    wanted under its other name."""
    for limit in [int(r[6:]) for r in repairs if r.startswith("limit ")]:
        body = {k: min(v, limit) if isinstance(v, int) and k in (
            "max_tokens", "max_completion_tokens", "max_output_tokens") else v
            for k, v in body.items()}
    for path in [r.partition(" ")[2] for r in repairs if r.startswith(("drop ", "unset "))]:
        value = body.get(path.split(".")[0])
        body = without(body, path.split("."))
        if path in ("max_tokens", "max_completion_tokens") and value is not None:
            other = "max_completion_tokens" if path == "max_tokens" else "max_tokens"
            if f"drop {other}" not in repairs:
                body[other] = value
    return body


def _chat_thinking(request: Request, target: Target) -> dict:
    wish, effort = request.thinking, wanted_effort(request.thinking)
    if wish.is_on is None and effort == "":
        return {}
    style = next((s for s in THINKING_STYLES if s in target.provider.quirks), "")
    if style:
        return THINKING_STYLES[style](effort, wish)
    return {"reasoning_effort": effort} if effort else {}


# Chat: requests to upstreams

NOT_KEPT = "(not kept)"     # in place of reasoning: an empty one is refused by some


def _chat_media(block: Media) -> dict:
    source = block.url or f"data:{block.media_type};base64,{block.data}"
    if block.media_type.startswith("audio/"):
        kind = next((k for k, v in AUDIO_TYPES.items() if v == block.media_type), "wav")
        return {"type": "input_audio", "input_audio": {"data": block.data, "format": kind}}
    if block.media_type == "application/pdf":
        return {"type": "file", "file": {"filename": block.name or "document.pdf",
                                         "file_data": source}}
    return {"type": "image_url", "image_url": {"url": source}}


class _ChatMessages:
    """Turns -> the messages of one Chat request."""

    def __init__(self, target: Target, signatures: Any, mended: Mended):
        self.target, self.signatures, self.mended, self.out = target, signatures, mended, []
        self.replays = "reasoning_replay" in target.provider.quirks

    def assistant(self, turn: Turn) -> None:
        text = "\n\n".join(b.text for b in turn.blocks if isinstance(b, Text))
        calls = [{"id": call_reference(b.id), "type": "function", "function": {
            "name": tool_name(b.name), "arguments": json_encode(b.arguments)}}
            for b in turn.blocks if isinstance(b, ToolCall)]
        message: dict = {"role": "assistant", "content": text or None}
        if calls:
            message["tool_calls"] = calls
        elif not text:
            message["content"] = "."
        self._thoughts(turn, message, bool(calls))
        self.out.append(message)

    def _thoughts(self, turn: Turn, message: dict, has_calls: bool) -> None:
        told, details = [], []
        for block in turn.blocks:
            if isinstance(block, Thinking):
                own = thought_signature(block, self.signatures, "o",
                                        self.target.provider.signature_tag)
                if own is None or not self.replays:
                    self.mended["thoughts of other models left out"] += bool(block.text)
                elif own.raw.startswith("["):
                    with contextlib.suppress(ValueError, RecursionError):   # a client changed it
                        details += objects_of(json.loads(own.raw))
                else:
                    told.append(block.text)
        if details:
            message["reasoning_details"] = details
        elif self.replays and (has_calls or any(told)):
            message["reasoning_content"] = "".join(told) or NOT_KEPT

    def user(self, turn: Turn) -> None:
        parts: list[dict] = []
        for block in turn.blocks:
            if isinstance(block, ToolResult):
                parts += self._result(block)
            elif isinstance(block, Note):
                self._say(parts)
                parts = []
                self.out.append({"role": "system", "content": block.text})
            elif isinstance(block, Media):
                parts.append(_chat_media(block))
            elif not is_blank(block):
                parts.append({"type": "text", "text": block.text})
        self._say(parts)

    def _result(self, result: ToolResult) -> list[dict]:
        """The message of a result; its images, which have no place in that, for the next one."""
        text = "\n".join(b.text for b in result.blocks if isinstance(b, Text))
        media = [_chat_media(b) for b in result.blocks if isinstance(b, Media)]
        note = f"\n[{len(media)} files follow]" if media else ""
        self.out.append({"role": "tool", "tool_call_id": call_reference(result.call_id),
                         "content": (text + note).strip("\n") or "(no output)"})
        return media

    def _say(self, parts: list[dict]) -> None:
        if parts:
            is_text = all(p["type"] == "text" for p in parts)
            content = "\n\n".join(p["text"] for p in parts) if is_text else parts
            self.out.append({"role": "user", "content": content})


def chat_render_request(request: Request, target: Target, signatures: Any,
                        repairs: frozenset = frozenset()) -> Rendered:
    """The Chat body of a request.  `repairs`: `core_schemas`, `bare_schemas`, `drop <parameter>`,
    `schema_as_text`, `old_media`."""
    mended, quirks = Mended(), target.provider.quirks
    more_system, turns = repair_turns(request.turns, mended, Note)
    turns = drop_old_media(turns) if "old_media" in repairs else turns
    messages = _ChatMessages(target, signatures, mended)
    system = [text for text in (*request.system, *more_system) if text.strip()]
    for turn in turns:
        (messages.assistant if turn.role == "assistant" else messages.user)(turn)
    body: dict = {"model": target.upstream_id, "messages": messages.out, "stream": True}
    if "no_stream_options" not in quirks:
        body["stream_options"] = {"include_usage": True}
    if request.max_tokens:
        name = "max_completion_tokens" if "completion_limit" in quirks else "max_tokens"
        body[name] = request.max_tokens
    body.update(_openai_sampling(request, "seed", "presence_penalty", "frequency_penalty",
                                 "verbosity", "service_tier", "user"))
    if request.stop_sequences:
        body["stop"] = [s for s in request.stop_sequences if s.strip()][:4] or None
    body.update(_chat_thinking(request, target))
    body.update(_openai_tools(request, repairs, quirks, lambda row: {
        "type": "function", "function": {k: v for k, v in row.items() if v is not False}}))
    if request.json_schema is not None:
        as_text = "schema_as_text" in repairs or "no_json_schema" in quirks
        if request.json_schema == ANY_OBJECT or as_text:
            body["response_format"] = {"type": "json_object"}
        else:
            body["response_format"] = {"type": "json_schema", "json_schema": {
                "name": request.more.get("schema_name") or "answer",
                **({"strict": True} if request.more.get("schema_strict") else {}),
                "schema": request.json_schema}}
        if as_text or request.json_schema == ANY_OBJECT and "json" not in "".join(system).lower():
            system.append(schema_order(request.json_schema))
        if "drop response_format" in repairs and not as_text:
            system.append(schema_order(request.json_schema))
    if system:
        messages.out.insert(0, {"role": "system", "content": "\n\n".join(system)})
    body = without_refused({k: v for k, v in body.items() if v is not None}, repairs)
    shape = answer_shape(request, turns, mended, "o", target.provider.signature_tag, signatures)
    return Rendered(body, {}, shape, mended)


# Chat: answers of upstreams

_CHAT_STOPS = {
    "stop": Stop.END, "eos": Stop.END, "end_turn": Stop.END, "length": Stop.LENGTH,
    "max_tokens": Stop.LENGTH, "model_length": Stop.LENGTH, "repetition": Stop.LENGTH,
    "tool_calls": Stop.TOOL, "function_call": Stop.TOOL, "content_filter": Stop.REFUSAL,
    "sensitive": Stop.REFUSAL, "stop_sequence": Stop.SEQUENCE}
_MINIMAX_STATUS = {1001: 504, 1002: 429, 1004: 401, 1008: 402, 1039: 429}


def chat_parse_usage(usage: Any) -> dict[str, int]:
    """The counters of a `usage` of either dialect, as a METER.  DeepSeek and Kimi tell what was
    cached in fields of their own."""
    usage = object_of(usage)
    told = object_of(usage.get("prompt_tokens_details") or usage.get("input_tokens_details"))
    spent = object_of(usage.get("completion_tokens_details") or usage.get("output_tokens_details"))
    found = {"input": usage.get("prompt_tokens", usage.get("input_tokens")),
             "cached": told.get("cached_tokens") or usage.get("cached_tokens")
             or usage.get("prompt_cache_hit_tokens"),
             "written": told.get("cache_write_tokens"),
             "output": usage.get("completion_tokens", usage.get("output_tokens")),
             "thinking": spent.get("reasoning_tokens")}
    return {name: count for name, count in found.items() if isinstance(count, int) and count > 0}


def openai_fault(event: Mapping) -> None:
    """Raises UpstreamFault where an event is an error: OpenAI's, or MiniMax's under status 200."""
    if event.get("error"):
        raise UpstreamFault(event if isinstance(event["error"], dict) else {
            "error": {"message": str(event["error"]), "code": event.get("code")}})
    told = object_of(event.get("base_resp"))
    if told.get("status_code"):
        raise UpstreamFault({"error": {"message": str(told.get("status_msg")),
                                       "code": _MINIMAX_STATUS.get(told["status_code"], 500)}})


class ChatParser:
    """Events of one Chat answer -> loose pieces, with every tolerance that servers need which are
    merely compatible."""

    def __init__(self, target: Target):
        self.queue = CallQueue()
        self._by_index: dict[Any, _Call] = {}
        self._details: list[dict] = []
        self._waiting: list[tuple[Kind, Any]] = []      # said amid the pieces of a call
        self._is_thinking = self._has_finish = self._has_content = self._is_refusal = False
        self._tags = ThinkTags() if "inline_think" in target.provider.quirks else None

    def __call__(self, text: str) -> list[tuple[Kind, Any]]:
        if text.strip() == "[DONE]":
            late = self._has_content and not self._has_finish
            return self._finish("stop") if late else []
        event = json.loads(text)
        if not isinstance(event, dict):
            raise ValueError("not an object")
        openai_fault(event)
        choice = next(iter(objects_of(event.get("choices"))), {})
        usage = chat_parse_usage(event.get("usage") or choice.get("usage"))
        out: list[tuple[Kind, Any]] = [(Kind.METER, usage)] if usage else []
        delta = object_of(choice.get("delta") or choice.get("message"))
        if delta:
            self._delta(delta, out)
        if isinstance(choice.get("text"), str):
            self._say(choice["text"], out)
        if choice.get("finish_reason"):
            out += self._finish(str(choice["finish_reason"]))
        return out

    def takes_plain(self, kind: Kind) -> bool:
        """Whether a piece that goes on with what was said last needs nothing from here."""
        return self._is_thinking is (kind is Kind.THINKING) and not (
            self._tags or self.queue.calls or self._waiting)

    def _delta(self, delta: dict, out: list) -> None:
        self._keep(objects_of(delta.get("reasoning_details")))
        thought = chat_thought(delta)
        if thought:
            self._is_thinking = self._has_content = True
            self._aside([(Kind.THINKING, thought)], out)
        content = delta.get("content")
        if isinstance(content, list):
            content = "".join(str(p.get("text") or "") for p in objects_of(content))
        for said in (content, delta.get("refusal")):
            if isinstance(said, str) and said:
                self._say(said, out)
        self._is_refusal |= bool(delta.get("refusal"))
        for note in objects_of(delta.get("annotations")):
            told = object_of(note.get("url_citation"))
            if isinstance(told.get("url"), str):
                out.append((Kind.CITATION, {"url": told["url"], "text": "",
                                            "title": str(told.get("title") or "")}))
        rows = objects_of(delta.get("tool_calls"))
        if isinstance(delta.get("function_call"), dict):
            rows = rows + [{"index": "old", "function": delta["function_call"]}]
        for position, row in enumerate(rows):
            self._call(position, row)
        if rows:
            if not self._waiting:
                self._end_thought(out)
            out += self.queue.pieces()

    def _say(self, text: str, out: list) -> None:
        self._has_content = True
        self._end_thought(self._waiting if self._waiting else out)
        self._aside(self._tags.feed(text) if self._tags else [(Kind.TEXT, text)], out)

    def _aside(self, pieces: list, out: list) -> None:
        """Text and thoughts; amid the pieces of a call they wait, or its rest would be lost."""
        if self._waiting or not all([call.is_whole() for call in self.queue.calls]):
            self._waiting += pieces
        else:
            out += self.queue.pieces(True) + pieces

    def _keep(self, details: list[dict]) -> None:
        """Reasoning details as they are to be sent back: pieces of one entry joined."""
        for row in details:
            last = self._details[-1] if self._details else {}
            if last and (last.get("type"), last.get("index")) == (row.get("type"),
                                                                  row.get("index")):
                for key, value in row.items():
                    if key in ("text", "summary", "data") and isinstance(value, str):
                        value = str(last.get(key) or "") + value
                    last[key] = value if value is not None else last.get(key)
            else:
                self._details.append(dict(row))

    def _end_thought(self, out: list) -> None:
        if self._is_thinking:
            raw = json_encode(self._details) if self._details else "-"
            out.append((Kind.SIGNATURE, (raw, True)))
            self._is_thinking = False

    def _call(self, position: int, row: dict) -> None:
        inner = object_of(row.get("function") or row.get("custom"))
        name, call_id = str(inner.get("name") or ""), str(row.get("id") or "")
        index = row.get("index")
        if index is None:       # by its id; else the last one goes on, unless this is a new one
            last = next(reversed(self._by_index), None)
            is_new = last is None or name and (position or self._by_index[last].parts)
            index = call_id or (("row", len(self._by_index)) if is_new else last)
        call = self._by_index.get(index)
        if call is None or call_id and call.id and call_id != call.id:
            call = self._by_index[index] = _Call(call_id, name)
            self.queue.calls.append(call)
            self._has_content = True
        else:
            call.id = call.id or call_id
            if name and name != call.name and not call.is_open:
                call.name += name
        arguments = inner.get("arguments", inner.get("input"))
        if arguments and not call.is_closed:
            call.parts.append(arguments if isinstance(arguments, str) else json_encode(arguments))

    def _finish(self, word: str) -> list[tuple[Kind, Any]]:
        if word == "error":
            raise UpstreamFault({"error": {"message": "the upstream ended its answer by an error",
                                           "code": 502}})
        self._has_finish = True
        out: list[tuple[Kind, Any]] = self._tags.end() if self._tags else []
        if not self._waiting:
            self._end_thought(out)
        out += self.queue.pieces(True) + self._waiting
        self._waiting = []
        self._end_thought(out)
        stop = Stop.REFUSAL if self._is_refusal else _CHAT_STOPS.get(word, Stop.END)
        return [*out, (Kind.FINISH, (stop, word if stop is Stop.REFUSAL else ""))]


class ChatPlain(PlainEvents):
    """Those of `parser`'s stream, as long as it holds nothing back."""
    opens = False
    form = (r'\{(?:"(?:id|object|created|model|system_fingerprint|service_tier|provider)":'
            r'(?:"[^"\\\x00-\x1f]*"|[1-9][0-9]{0,12}|null),)*"choices":\[\{"index":0,"delta":\{'
            r'(?:"role":"assistant",)?(?:(?P<thinks>(?:"content":(?:null|""),)?"reasoning_content")'
            r'|(?:"reasoning_content":null,)?"content"):"'
            rf'(?P<text>{PLAIN_TEXT})(?P<usage>)(?P<rest>"'
            r'(?:,"(?:(?(thinks)content|reasoning_content)|tool_calls|refusal)":null)*\}'
            r'(?:,"(?:logprobs|finish_reason|native_finish_reason)":null)*\}\]'
            r'(?:,"(?:usage|obfuscation|service_tier|system_fingerprint)":'
            r'(?:null|"[^"\\\x00-\x1f]*"))*\})')

    def __init__(self, parser: ChatParser):
        super().__init__()
        self.parser = parser

    def __call__(self, event: str) -> tuple[Kind, str, str | None] | None:
        row = super().__call__(event)
        return row if row and self.parser.takes_plain(row[0]) else None


# Chat: relayed

def openai_relay_body(request: Request, target: Target, repairs: frozenset,
                      changes: dict) -> Rendered:
    """The client's own body with the model's name and `changes`, without what was refused."""
    text = request.native.raw.decode("utf-8")
    if request.model != target.upstream_id:
        changes["model"] = quote(target.upstream_id)
    if any(r.startswith(("drop ", "unset ")) for r in repairs):
        text, changes = json_splice(text, changes), {}      # what was added here is dropped too
        body = json.loads(text)
        rest = without_refused(body, repairs)
        changes.update({k: None if k not in rest else json_encode(rest[k])
                        for k in {*body, *rest} if rest.get(k) != body.get(k)
                        or (k in body) != (k in rest)})
    raw = json_splice(text, changes).encode("utf-8")
    return Rendered(raw, dict(request.native.headers), AnswerShape(), Mended())


def variant_effort(request: Request) -> str:
    """What the model's name says about thinking, "" where it says nothing."""
    wish = model_variant(request.model)[1] if request.wanted != request.model else None
    return wanted_effort(wish) if wish else ""


def _with_reasoning(messages: list) -> list | None:
    """The messages with a word in place of reasoning that another model did not tell or the client
    did not keep; None where none is missing."""
    bare = [m for m in objects_of(messages) if m.get("tool_calls") and not any(
        m.get(name) for name in ("reasoning_content", "reasoning", "reasoning_details"))]
    for message in bare:
        message["reasoning_content"] = NOT_KEPT
    return messages if bare else None


def chat_relay_request(request: Request, target: Target,
                       repairs: frozenset = frozenset()) -> Rendered:
    """The client's own Chat body; usage is asked for in streams, since it is counted here."""
    changes: dict = {}
    if "reasoning_replay" in target.provider.quirks and any(
            isinstance(b, ToolCall) for t in request.turns for b in t.blocks):
        messages = _with_reasoning(json.loads(request.native.raw)["messages"])
        if messages:
            changes["messages"] = json_encode(messages)
    if variant_effort(request):         # in the words of this service
        wish = model_variant(request.model)[1]
        changes.update({k: json_encode(v) for k, v in _chat_thinking(
            replace(request, thinking=wish), target).items()})
    if request.is_streaming and not request.ext.get("usage") and (
            "no_stream_options" not in target.provider.quirks):
        changes["stream_options"] = '{"include_usage":true}'
    return openai_relay_body(request, target, repairs, changes)


class ChatRelay(EventRelay):
    """Chunks of a Chat upstream on their way to a Chat client.  A chunk of usage that only we asked
    for stays here."""
    _TELLS = re.compile(r'"(?:usage|error)"\s*:\s*[{"]|"finish_reason"\s*:\s*"')
    _TEXT = re.compile(r'(.*?"content": ?")[^"\\]*(?:\\.[^"\\]*)*(".*)')
    last_word = "data: [DONE]\n\n"
    _head = _rest = "\0"         # of the last text that went by
    _named_head = _named_rest = ""

    def feed(self, event: str) -> str:
        if event.startswith(self._head) and event.endswith(self._rest, len(self._head)):
            text = event[len(self._head):-len(self._rest)]
            if '"' not in text or '"' not in text.replace('\\"', ""):
                # nothing but its text differs from one that was looked at: 1.3 us against 2.8
                return self._named_head + text + self._named_rest
        if self.has_content and not self._TELLS.search(event) and event.startswith("data: {"):
            self._learn(event)
            return self.renamed(event) + "\n\n"
        data = event_data(event)
        if data.strip() == "[DONE]":
            self.is_over = True
            return self.last_word
        value = json.loads(data) if data.startswith("{") else None
        if not isinstance(value, dict):
            return ""                   # a comment
        openai_fault(value)
        choice = next(iter(objects_of(value.get("choices"))), {})
        self.counts.update(chat_parse_usage(value.get("usage") or choice.get("usage")))
        delta = object_of(choice.get("delta"))
        self.has_finish |= bool(choice.get("finish_reason"))
        self.has_content |= self.has_finish or any(v for k, v in delta.items() if k != "role")
        if value.get("choices") == [] and value.get("usage") and not self.state.wants_usage:
            return ""
        return self.renamed(event) + "\n\n"

    def _learn(self, event: str) -> None:
        """What stands before and after a text, as it comes and as it goes on."""
        parts = self._TEXT.fullmatch(event)
        if parts:
            self._head, self._rest = parts.groups()
            self._named_head = self.renamed(self._head)
            is_told = _text_member(self.member).search(self._head) is not None
            self._named_rest = (self._rest if is_told else self.renamed(self._rest)) + "\n\n"

    def read_whole(self, value: dict) -> None:
        openai_fault(value)
        if not isinstance(value.get("choices"), list):
            raise UpstreamFault(value)
        self.counts.update(chat_parse_usage(value.get("usage")))


# Responses: requests of clients

def responses_parse_request(body: Any, headers: Mapping[str, str], raw: bytes = b"",
                            **_: Any) -> Request:
    """The neutral Request of a Responses body, an earlier response put before its input by whoever
    keeps those.  Raises ProxyError invalid_request, no_response."""
    body = dict_at(body, "body")
    agent = headers.get("user-agent", "") + headers.get("originator", "")
    ext = {"codex": "codex" in agent.lower(), "echo": responses_echo(body)}
    return _openai_request("responses", body, headers, raw, _responses_fields, ext)


# Responses: answers to clients

@dataclass
class ResponsesAnswer:
    """What is remembered between the deltas of one answer.  `item` is the open output item, `texts`
    what its deltas said; `output` are the items that are done."""
    model: str
    created: int
    echo: Mapping = field(default_factory=dict)
    kinds: Mapping[str, ClientTool] = field(default_factory=dict)
    encrypts: bool = False
    is_codex: bool = False
    id: str = field(default_factory=lambda: new_id("resp_"))
    begun: bool = False
    sequence: int = 0
    output: list = field(default_factory=list)
    item: dict | None = None
    texts: list = field(default_factory=list)
    custom: InputText | None = None
    signature: str = ""
    is_complete: bool = False


def responses_answer(request: Request, now: int) -> ResponsesAnswer:
    ext = request.ext
    return ResponsesAnswer(request.model, now, ext.get("echo", {}), ext.get("tools", {}),
                           ext.get("encrypted", False), ext.get("codex", False))


def _numbered(state: ResponsesAnswer, kind: str, **fields: Any) -> str:
    """One event with its number."""
    state.sequence += 1
    data = {"type": kind, "sequence_number": state.sequence - 1, **fields}
    return f"event: {kind}\ndata: {json_encode(data)}\n\n"


def _response(state: ResponsesAnswer, status: str, **fields: Any) -> dict:
    return {"id": state.id, "object": "response", "created_at": state.created, "status": status,
            "background": False, "error": None, "incomplete_details": None, "model": state.model,
            "output": [], "usage": None, **state.echo, **fields}


def _responses_begin(state: ResponsesAnswer, delta: Begin) -> str:
    if state.begun:
        return ""
    state.begun = True
    response = _response(state, "in_progress")
    return (_numbered(state, "response.created", response=response)
            + _numbered(state, "response.in_progress", response=response))


def _item_place(state: ResponsesAnswer) -> dict:
    return {"item_id": state.item["id"], "output_index": len(state.output)}


def _open_item(state: ResponsesAnswer, item: dict) -> str:
    state.item, state.texts, state.signature = item, [], ""
    return _numbered(state, "response.output_item.added", output_index=len(state.output), item=item)


def call_item(told: ClientTool, call_id: str, arguments: str, status: str) -> dict:
    """The item of a call as its client knows the tool; `arguments` is JSON, or "" at its
    beginning."""
    head = {"id": new_id("fc_"), "call_id": call_id, "status": status}
    home = {"namespace": told.namespace} if told.namespace else {}
    if told.kind == "custom":
        return {**head, "id": new_id("ctc_"), "type": "custom_tool_call", "name": told.name,
                "input": freeform_text(arguments) if arguments else "", **home}
    if told.kind in SHELL_TOOLS:
        given = openai_arguments(arguments)
        if told.kind == "apply_patch":
            return {**head, "type": "apply_patch_call", "operation": given}
        more = {"type": "exec", "env": {}} if told.kind == "local_shell" else {}
        return {**head, "type": told.kind + "_call", "action": {**more, **given}}
    if told.kind == "tool_search":
        return {**head, "type": "tool_search_call", "execution": "client",
                "arguments": openai_arguments(arguments)}
    return {**head, "type": "function_call", "name": told.name, "arguments": arguments, **home}


def _responses_start(state: ResponsesAnswer, delta: BlockStart) -> str:
    if delta.kind is Kind.TEXT:
        item = {"id": new_id("msg_"), "type": "message", "role": "assistant",
                "status": "in_progress", "content": []}
        return _open_item(state, item) + _numbered(
            state, "response.content_part.added", **_item_place(state), content_index=0,
            part={"type": "output_text", "text": "", "annotations": [], "logprobs": []})
    if delta.kind is Kind.CALL:
        told = state.kinds.get(delta.name) or ClientTool("function", delta.name)
        state.custom = InputText() if told.kind == "custom" else None
        return _open_item(state, call_item(told, delta.id, "", "in_progress"))
    if delta.kind is Kind.SERVER_CALL and delta.name == "web_search":
        out = _open_item(state, {"id": new_id("ws_"), "type": "web_search_call",
                                 "status": "in_progress", "action": {"type": "search"}})
        return out + "".join(_numbered(state, f"response.web_search_call.{word}",
                                       **_item_place(state))
                             for word in ("in_progress", "searching"))
    return ""                   # thoughts open with what there is to show of them


def _open_thought(state: ResponsesAnswer) -> str:
    if state.item is not None:
        return ""
    return _open_item(state, {"id": new_id("rs_agp"), "type": "reasoning", "summary": [],
                              "status": "in_progress"})


def _responses_arguments(state: ResponsesAnswer, text: str) -> str:
    state.texts.append(text)
    kind = state.item["type"]
    if kind == "custom_tool_call":
        text = state.custom.feed(text)
        event = "response.custom_tool_call_input.delta"
    else:
        event = "response.function_call_arguments.delta" if kind == "function_call" else ""
    return _numbered(state, event, **_item_place(state), delta=text) if text and event else ""


def _responses_piece(state: ResponsesAnswer, delta: Piece) -> str:
    kind, text = delta.kind, delta.text
    if not text:
        return ""
    if kind is Kind.TEXT:
        state.texts.append(text)
        return _numbered(state, "response.output_text.delta", **_item_place(state),
                         content_index=0, delta=text, logprobs=[])
    if kind is Kind.THINKING:
        out = _open_thought(state)
        if not state.texts:
            out += _numbered(state, "response.reasoning_summary_part.added", **_item_place(state),
                             summary_index=0, part={"type": "summary_text", "text": ""})
        state.texts.append(text)
        return out + _numbered(state, "response.reasoning_summary_text.delta", **_item_place(state),
                               summary_index=0, delta=text)
    if kind is Kind.SIGNATURE and state.encrypts:
        out = _open_thought(state)
        state.signature = text
        return out
    if kind is Kind.ARGUMENTS and state.item is not None:
        return _responses_arguments(state, text)
    if kind is Kind.CITATION and state.item is not None:
        notes = state.item["content"]       # kept there until the item is done
        note = url_citation(json.loads(text), sum(map(len, state.texts)))
        if note:
            notes.append({"type": "url_citation", **note})
            return _numbered(state, "response.output_text.annotation.added", **_item_place(state),
                             content_index=0, annotation_index=len(notes) - 1, annotation=notes[-1])
    return ""


def _message_end(state: ResponsesAnswer, item: dict) -> str:
    place = {**_item_place(state), "content_index": 0}
    text, notes = "".join(state.texts), item["content"]
    part = {"type": "output_text", "text": text, "annotations": notes, "logprobs": []}
    item.update(content=[part], status="completed")
    return (_numbered(state, "response.output_text.done", **place, text=text, logprobs=[])
            + _numbered(state, "response.content_part.done", **place, part=part))


def _thought_end(state: ResponsesAnswer, item: dict) -> str:
    out, text = "", "".join(state.texts)
    if text:
        part = {"type": "summary_text", "text": text}
        place = {**_item_place(state), "summary_index": 0}
        out = (_numbered(state, "response.reasoning_summary_text.done", **place, text=text)
               + _numbered(state, "response.reasoning_summary_part.done", **place, part=part))
        item["summary"] = [part]
    item["status"] = "completed"
    if state.signature:
        item["encrypted_content"] = state.signature
    return out


def _call_end(state: ResponsesAnswer, item: dict) -> str:
    place, arguments = _item_place(state), "".join(state.texts) or "{}"
    if item["type"] == "custom_tool_call":
        rest = state.custom.end()
        item.update(input=state.custom.text, status="completed")
        event = "response.custom_tool_call_input."
        out = _numbered(state, event + "delta", **place, delta=rest) if rest else ""
        return out + _numbered(state, event + "done", **place, input=item["input"])
    if item["type"] == "function_call":
        item.update(arguments=arguments, status="completed")
        return _numbered(state, "response.function_call_arguments.done", **place,
                         arguments=arguments)
    kind = item["type"][:-5]
    told = call_item(ClientTool(kind, kind), item["call_id"], arguments, "completed")
    item.update({k: v for k, v in told.items() if k != "id"})
    return ""


def _search_end(state: ResponsesAnswer, item: dict) -> str:
    query = openai_arguments("".join(state.texts)).get("query") or ""
    item.update(status="completed", action={"type": "search", "query": query})
    return _numbered(state, "response.web_search_call.completed", **_item_place(state))


_ITEM_ENDS = {"message": _message_end, "reasoning": _thought_end, "web_search_call": _search_end}


def _responses_end(state: ResponsesAnswer, delta: BlockEnd) -> str:
    item = state.item
    if item is None:
        return ""
    out = _ITEM_ENDS.get(item["type"], _call_end)(state, item)
    out += _numbered(state, "response.output_item.done", output_index=len(state.output), item=item)
    state.output.append(item)
    state.item = state.custom = None
    return out


def _responses_end_fields(state: ResponsesAnswer, finish: Finish) -> tuple[str, dict]:
    """(status, fields) of the last response.  Codex repeats a turn that is incomplete [R1]."""
    why = STOP_WORDS[finish.stop].incomplete
    if state.is_codex and state.output and why == "max_output_tokens":
        why = ""
    fields = {"output": state.output, "usage": {
        name.replace("prompt", "input").replace("completion", "output"): value
        for name, value in chat_usage(finish.usage).items()}}
    if not why:
        return "completed", fields
    return "incomplete", {**fields, "incomplete_details": {"reason": why}}


def _responses_finish(state: ResponsesAnswer, delta: Finish) -> str:
    status, fields = _responses_end_fields(state, delta)
    state.is_complete = True
    return _numbered(state, "response." + status, response=_response(state, status, **fields))


def _responses_fault(state: ResponsesAnswer, delta: Fault) -> str:
    told = openai_render_error(delta.error, "")["error"]
    code = {"capacity": "server_error"}.get(delta.error.kind, told["code"])
    if code is None and delta.error.rule.status == 400:     # Codex repeats every other code ...
        code = "invalid_prompt"         # ... but for overload: its next try may go elsewhere
    message = told["message"]
    if delta.error.retry_after_s is not None and code == "rate_limit_exceeded":
        message += f" Please try again in {int(delta.error.retry_after_s + 0.999)}s."
    error = {"code": code or "server_error", "message": message}
    response = _response(state, "failed", error=error, output=state.output)
    return _numbered(state, "response.failed", response=response)


RESPONSES_EVENTS: dict[type, Callable[[ResponsesAnswer, Any], str]] = {
    Piece: _responses_piece, Begin: _responses_begin, BlockStart: _responses_start,
    BlockEnd: _responses_end, Finish: _responses_finish, Fault: _responses_fault,
    Run: lambda state, run: "".join([_responses_piece(state, p) for p in run.pieces()]),
}


def responses_render_delta(state: ResponsesAnswer, delta: Any) -> str:
    """One neutral delta -> the text of its events, ASCII."""
    return RESPONSES_EVENTS[type(delta)](state, delta)


def responses_render_reply(state: ResponsesAnswer, reply: Reply) -> dict:
    """The response object of a folded answer: that of its own last event."""
    for delta in deltas_of(reply)[:-1]:
        responses_render_delta(state, delta)
    status, fields = _responses_end_fields(state, reply.finish)
    state.is_complete = True
    return _response(state, status, **fields)


def responses_recall(body: Any, kept: Callable[[str], Any]) -> tuple[Any, dict]:
    """(the body with what an earlier response is about put before its input, what is to be known of
    that).  `kept` gives the row of an id, or None; see Replies."""
    if not isinstance(body, dict):
        return body, {}
    given = body.get("input", [])
    given = [{"role": "user", "content": given}] if isinstance(given, str) else given
    told = body.get("previous_response_id")
    if not isinstance(given, list):
        return body, {}
    links, at, seen, left = [], told, set(), MOST_RECALLED_BYTES
    while isinstance(at, str) and at and at not in seen:
        seen.add(at)
        row = kept(at)
        if row is None:
            return body, {"input": given}
        links.append(row)
        left -= row.get("size", 0)
        if left < 0 or len(links) > MOST_LINKS:
            raise invalid("previous_response_id", "what it goes on from has become too long; send "
                          "what matters of it as `input`")
        at = row.get("previous")
    if not links:
        return body, {"input": given}
    is_relayed = all(row["relayed"] for row in links)
    whole = [item for row in reversed(links) for item in (*row["input"], *row["output"])] + given
    rest = {k: v for k, v in body.items() if k != "previous_response_id"}
    return {**rest, "input": whole}, {"input": given, "expanded": whole, "previous": told,
                                      "is_ours": not is_relayed}


def responses_keep(state: ResponsesAnswer, request: Request, is_relayed: bool) -> tuple | None:
    """(id, row for Replies) of an answer that its client may go on from; None where it may not."""
    echo = request.ext.get("echo", {})
    if not (state.is_complete and echo.get("store") and "input" in request.ext):
        return None
    return state.id, {"previous": request.ext.get("previous"), "input": request.ext["input"],
                      "output": state.output, "relayed": is_relayed}


# Responses: requests to upstreams

def _item_media(block: Media) -> dict:
    source = block.url or f"data:{block.media_type};base64,{block.data}"
    if block.media_type == "application/pdf":
        return {"type": "input_file", **({"file_url": source} if block.url else {
            "filename": block.name or "document.pdf", "file_data": source})}
    return {"type": "input_image", "image_url": source, "detail": "auto"}


class _InputItems:
    """Turns -> the input items of one Responses request."""

    def __init__(self, target: Target, signatures: Any, mended: Mended, is_plain: bool):
        self.target, self.signatures, self.mended, self.out = target, signatures, mended, []
        self.is_plain = is_plain        # without reasoning, which was refused
        self.sent: list[str] = []

    def assistant(self, turn: Turn) -> None:
        for at, block in enumerate(turn.blocks):
            if isinstance(block, Thinking):
                own = thought_signature(block, self.signatures, "r",
                                        self.target.provider.signature_tag)
                if own and not self.is_plain and at + 1 < len(turn.blocks):       # [R3]
                    self.sent.append(own.raw)
                    summary = [{"type": "summary_text", "text": block.text}] if block.text else []
                    self.out.append({"type": "reasoning", "summary": summary,
                                     "encrypted_content": own.raw})
                else:
                    self.mended["thoughts of other models left out"] += bool(block.text)
            elif isinstance(block, ToolCall):
                self.out.append({"type": "function_call", "call_id": call_reference(block.id),
                                 "name": tool_name(block.name),
                                 "arguments": json_encode(block.arguments)})
            elif isinstance(block, Text):
                self.out.append({"type": "message", "role": "assistant", "content": [
                    {"type": "output_text", "text": block.text}]})

    def user(self, turn: Turn) -> None:
        parts: list[dict] = []
        for block in turn.blocks:
            if isinstance(block, ToolResult):
                self.out.append({"type": "function_call_output", "output": self._output(block),
                                 "call_id": call_reference(block.call_id)})
            elif isinstance(block, Note):
                self._say("user", parts)
                self._say("developer", [{"type": "input_text", "text": block.text}])
                parts = []
            elif isinstance(block, Media):
                parts.append(_item_media(block))
            elif not is_blank(block):
                parts.append({"type": "input_text", "text": block.text})
        self._say("user", parts)

    def _say(self, role: str, parts: list[dict]) -> None:
        if parts:
            self.out.append({"type": "message", "role": role, "content": parts})

    @staticmethod
    def _output(result: ToolResult) -> Any:
        if all(isinstance(b, Text) for b in result.blocks):
            return "\n".join(b.text for b in result.blocks) or "(no output)"
        return [_item_media(b) if isinstance(b, Media) else {"type": "input_text", "text": b.text}
                for b in result.blocks]


def responses_render_request(request: Request, target: Target, signatures: Any,
                             repairs: frozenset = frozenset()) -> Rendered:
    """The Responses body of a request.  `repairs`: `signatures`, `core_schemas`, `bare_schemas`,
    `drop <parameter>`, `schema_as_text`, `old_media`."""
    mended, wish = Mended(), request.thinking
    more_system, turns = repair_turns(request.turns, mended, Note)
    turns = drop_old_media(turns) if "old_media" in repairs else turns
    items = _InputItems(target, signatures, mended, "signatures" in repairs)
    for turn in turns:
        (items.assistant if turn.role == "assistant" else items.user)(turn)
    body: dict = {"model": target.upstream_id, "input": items.out, "stream": True, "store": False,
                  "include": ["reasoning.encrypted_content"]}
    system = [text for text in (*request.system, *more_system) if text.strip()]
    if request.max_tokens:
        body["max_output_tokens"] = max(16, request.max_tokens)     # the API's least
    body.update(_openai_sampling(request, "service_tier", "user"))
    effort = wanted_effort(wish)
    if effort or wish.is_on:
        body["reasoning"] = {**({"effort": effort} if effort else {}),
                             **({"summary": "auto"} if wish.is_shown and wish.shows_text else {})}
    body.update(_openai_tools(request, repairs, target.provider.quirks,
                              lambda row: {"type": "function", **row}))
    if request.search:
        body["tools"] = [{"type": "web_search", **({"filters": {
            "allowed_domains": list(request.search.allowed)}} if request.search.allowed else {})}]
    told: dict = {"verbosity": request.more["verbosity"]} if "verbosity" in request.more else {}
    if request.json_schema is not None and "schema_as_text" in repairs:
        system.append(schema_order(request.json_schema))
    elif request.json_schema is not None:
        if request.json_schema == ANY_OBJECT:       # OpenAI wants to read the word, too
            system.append(schema_order(ANY_OBJECT))
        told["format"] = {"type": "json_object"} if request.json_schema == ANY_OBJECT else {
            "type": "json_schema", "name": request.more.get("schema_name") or "answer",
            "schema": request.json_schema, "strict": bool(request.more.get("schema_strict"))}
    if told:
        body["text"] = told
    if system:
        body["instructions"] = "\n\n".join(system)
    shape = answer_shape(request, turns, mended, "r", target.provider.signature_tag, signatures)
    return Rendered(without_refused(body, repairs), {}, shape, mended, tuple(items.sent))


# Responses: answers of upstreams

_TEXT_EVENTS = {        # what a delta's event says
    "response.output_text.delta": Kind.TEXT, "response.refusal.delta": Kind.TEXT,
    "response.reasoning_summary_text.delta": Kind.THINKING,
    "response.reasoning_text.delta": Kind.THINKING}
_PARALLEL = ("parallel", "multi_tool_use.parallel", "multi_tool_use_parallel")
_INCOMPLETE = {"max_output_tokens": Stop.LENGTH, "content_filter": Stop.REFUSAL}


def responses_fault(event: Mapping) -> UpstreamFault:
    """The error of an event: flat, nested, or inside the response that failed."""
    told = object_of(object_of(event.get("response")).get("error")) or object_of(event.get("error"))
    told = told or {k: v for k, v in event.items() if k in ("code", "message", "param")}
    return UpstreamFault({"error": told})


def parallel_calls(call: _Call) -> list[_Call]:
    """The calls inside one that OpenAI's models sometimes write in their place; else just it."""
    rows = [r for r in objects_of(openai_arguments("".join(call.parts)).get("tool_uses"))
            if str(r.get("recipient_name")).startswith("functions.")]
    calls = [_Call("" if at else call.id, r["recipient_name"][10:]) for at, r in enumerate(rows)]
    for one, row in zip(calls, rows):
        one.parts.append(json_encode(object_of(row.get("parameters"))))
    for one in calls or [call]:
        one.is_closed = True
    return calls or [call]


class ResponsesParser:
    """Events of one Responses answer -> loose pieces.  Items are told apart by their place [R2]."""

    def __init__(self, target: Target):
        self.queue = CallQueue()
        self._calls: dict[Any, _Call] = {}
        self._said: set = set()         # places of items that came in deltas
        self._has_call = self._is_refusal = False

    def __call__(self, text: str) -> list[tuple[Kind, Any]]:
        event = json.loads(text) if text.strip() != "[DONE]" else {"type": ""}
        if not isinstance(event, dict):
            raise ValueError("not an object")
        kind, place = event.get("type"), event.get("output_index")
        if kind in _TEXT_EVENTS:
            self._said.add(place)
            self._is_refusal |= kind == "response.refusal.delta"
            return [(_TEXT_EVENTS[kind], str(event.get("delta") or ""))]
        if kind == "response.function_call_arguments.delta" and place in self._calls:
            self._calls[place].parts.append(str(event.get("delta") or ""))
            return self.queue.pieces()
        handler = self._EVENTS.get(kind)
        if handler is None and event.get("error"):
            handler = ResponsesParser._failed
        return handler(self, event, place) if handler else []

    def _added(self, event: dict, place: Any) -> list:
        item = object_of(event.get("item"))
        if item.get("type") in ("function_call", "custom_tool_call"):
            call = self._calls[place] = _Call(str(item.get("call_id") or item.get("id") or ""),
                                              openai_name(str(item.get("name") or ""),
                                                          str(item.get("namespace") or "")))
            self._has_call = True
            if call.name not in _PARALLEL:      # those are looked at when they are whole
                self.queue.calls.append(call)
            return self.queue.pieces()
        return []

    def _summary(self, event: dict, place: Any) -> list:
        """The parts of a summary are paragraphs."""
        return [(Kind.THINKING, "\n\n")] if event.get("summary_index") and (
            place in self._said) else []

    def _done(self, event: dict, place: Any) -> list:
        item = object_of(event.get("item"))
        kind, out = item.get("type"), []
        if kind == "reasoning":
            rows = objects_of(item.get("summary")) or objects_of(item.get("content"))
            if place not in self._said and rows:
                out.append((Kind.THINKING, "\n\n".join(str(r.get("text") or "") for r in rows)))
            if item.get("encrypted_content"):
                if place not in self._said and not rows:
                    out.append((Kind.THINKING, None))       # it has no text to open its block
                out.append((Kind.SIGNATURE, (str(item["encrypted_content"]), True)))
            return [*out, (Kind.BLOCK_END, None)]
        if kind == "message":
            parts = objects_of(item.get("content"))
            if place not in self._said:
                out = [(Kind.TEXT, str(p.get("text") or p.get("refusal") or "")) for p in parts]
            self._is_refusal |= any("refusal" in p for p in parts)
            return [*out, (Kind.BLOCK_END, None)]
        if kind == "web_search_call":
            query = object_of(item.get("action")).get("query") or ""
            call_id = new_id("srvtoolu_agp")
            return [(Kind.SERVER_CALL, ToolCall(call_id, "web_search", {"query": query})),
                    (Kind.FOUND, Found(call_id, "web_search")), (Kind.METER, {"searches": 1})]
        if place not in self._calls:
            self._added(event, place)
        call = self._calls.get(place)
        if call is not None and not call.is_closed:
            arguments = item.get("arguments")
            if kind == "custom_tool_call":
                call.parts = [json_encode({"input": item.get("input") or ""})]
            elif not call.parts and arguments:
                call.parts.append(str(arguments))
            call.is_closed = True
            self.queue.calls += parallel_calls(call) if call.name in _PARALLEL else []
        return self.queue.pieces()

    def _annotation(self, event: dict, place: Any) -> list:
        note = object_of(event.get("annotation"))
        told = {"url": note.get("url"), "title": str(note.get("title") or ""), "text": ""}
        return [(Kind.CITATION, told)] if isinstance(note.get("url"), str) else []

    def _over(self, event: dict, place: Any) -> list:
        response = object_of(event.get("response"))
        why = object_of(response.get("incomplete_details")).get("reason")
        stop = Stop.TOOL if self._has_call else Stop.END
        if event["type"] == "response.incomplete":
            stop = _INCOMPLETE.get(why, Stop.LENGTH)
        stop = Stop.REFUSAL if self._is_refusal else stop
        usage = chat_parse_usage(response.get("usage"))
        return [*self.queue.pieces(True), *([(Kind.METER, usage)] if usage else []),
                (Kind.FINISH, (stop, str(why or "")))]

    def _failed(self, event: dict, place: Any) -> list:
        raise responses_fault(event)

    _EVENTS = {"response.output_item.added": _added, "response.output_item.done": _done,
               "response.reasoning_summary_part.added": _summary,
               "response.output_text.annotation.added": _annotation,
               "response.completed": _over, "response.incomplete": _over,
               "response.failed": _failed, "error": _failed}


# Responses: relayed

def _own_items(text: str, drops_all: bool) -> str:
    """An `input` without the reasoning that was made here, which OpenAI cannot read; or without
    any, where a service refused what another one made."""
    if not text.startswith("["):
        return text

    def is_kept(item: str) -> bool:
        if not ('"agp1.' in item or '"rs_agp' in item or drops_all):
            return True
        told = object_of(json.loads(item))
        return not (str(told.get("encrypted_content", "")).startswith("agp1.")
                    or told.get("type") == "reasoning" and (
                        drops_all or str(told.get("id")).startswith("rs_agp")))
    kept = [text[at:end] for _, _, at, end in json_spans(text)]
    return "[" + ",".join(filter(is_kept, kept)) + "]"


def responses_relay_request(request: Request, target: Target,
                            repairs: frozenset = frozenset()) -> Rendered:
    """The client's own Responses body.  `repairs`: `expand` puts an earlier response that only this
    proxy knows before its input, `reasoning` leaves that of other services out."""
    changes: dict = {}
    if "expanded" in request.ext and ("expand" in repairs or request.ext["is_ours"]):
        changes.update(previous_response_id=None, input=json_encode(request.ext["expanded"]))
    text = request.native.raw.decode("utf-8")
    drops_all = "reasoning" in repairs
    given = changes.get("input", text)          # an earlier response may hold them as well
    if '"agp1.' in given or '"rs_agp' in given or drops_all:
        for name, _, at, end in json_spans(text):
            if name == "input":
                changes.setdefault("input", text[at:end])
                changes["input"] = _own_items(changes["input"], drops_all)
    effort = variant_effort(request)
    if effort:
        told = object_of(json.loads(text).get("reasoning"))
        changes["reasoning"] = json_encode({**told, "effort": effort})
    return openai_relay_body(request, target, repairs, changes)


class ResponsesRelay(EventRelay):
    """Events of a Responses upstream on their way to a Responses client."""
    _NUMBER = re.compile(r'"sequence_number"\s*:\s*(\d{1,9})')
    _QUICK = ("event: response.output_text.delta\n", "event: response.function_call_arg",
              "event: response.reasoning_summary_text.delta\n", "event: response.custom_tool_call_")

    def feed(self, event: str) -> str:
        number = self._NUMBER.search(event)
        self.state.sequence = int(number[1]) + 1 if number else self.state.sequence + 1
        if self.has_content and event.startswith(self._QUICK):
            return event + "\n\n"
        data = event_data(event)
        value = json.loads(data) if data.startswith("{") else None
        if not isinstance(value, dict):
            return ""
        kind = value.get("type")
        if kind in ("error", "response.failed") or not kind and value.get("error"):
            self.state.sequence -= 1        # what is told in its place takes its number
            raise responses_fault(value)
        response = object_of(value.get("response"))
        if response:
            self.state.id = str(response.get("id") or self.state.id)
            self.counts.update(chat_parse_usage(response.get("usage")))
            span = next(s for s in json_spans(data) if s[0] == "response")
            inner = data[span[2]:span[3]]
            if "model" in response and response["model"] != self.state.model:
                inner = json_splice(inner, {"model": quote(self.state.model)})
                event = f"event: {kind}\ndata: {data[:span[2]]}{inner}{data[span[3]:]}"
        if kind == "response.created":
            self.state.begun = True
        if kind in ("response.completed", "response.incomplete"):
            self.has_finish = self.is_over = self.state.is_complete = True
            self.state.output = objects_of(response.get("output"))
        self.has_content |= self.has_finish or kind == "response.output_item.added" or bool(
            value.get("delta"))
        return event + "\n\n"

    def read_whole(self, value: dict) -> None:
        if value.get("error") or not isinstance(value.get("output"), list):
            raise responses_fault(value)
        self.state.id, self.state.output = str(value.get("id") or ""), objects_of(value["output"])
        self.state.is_complete = value.get("status") in (None, "completed", "incomplete")
        self.counts.update(chat_parse_usage(value.get("usage")))


def openai_render_model(model: Model, created: int) -> dict:
    """A row of /v1/models."""
    return {"id": model.id, "object": "model", "created": created, "owned_by": model.family,
            "display_name": model.label, "context_length": model.context_tokens,
            "context_window": model.context_tokens, "max_output_tokens": model.output_tokens}


CODEX_INSTRUCTIONS = (      # for models whose own instructions Codex does not bring along
    "You are a coding agent in a terminal on the user's machine.  Use the tools you are given to "
    "read, change and run what the task needs; keep going until it is done.  Change files with the "
    "shell.  Answer briefly: what you did, and what is left to do.")


def codex_render_model(model: Model, priority: int) -> dict:
    """A row of the catalogue that Codex asks for with `client_version`."""
    efforts = ("low", "medium", "high") if model.max_budget else ()
    return {"slug": model.id, "display_name": model.label, "description": model.label,
            "default_reasoning_level": "medium" if efforts else None,
            "supported_reasoning_levels": [{"effort": e, "description": e} for e in efforts],
            "shell_type": "shell_command", "visibility": "list", "supported_in_api": True,
            "priority": priority, "upgrade": None, "availability_nux": None,
            "base_instructions": CODEX_INSTRUCTIONS,
            "supports_reasoning_summaries": bool(efforts), "default_reasoning_summary": "auto",
            "support_verbosity": False, "default_verbosity": None,
            "apply_patch_tool_type": None, "web_search_tool_type": "text",
            "truncation_policy": {"mode": "bytes", "limit": 10_000},
            "supports_parallel_tool_calls": True, "context_window": model.context_tokens,
            "max_context_window": model.context_tokens,
            "auto_compact_token_limit": model.context_tokens * 9 // 10,
            "effective_context_window_percent": 95, "experimental_supported_tools": [],
            "input_modalities": ["text"] if model.family == "gpt-oss" else ["text", "image"],
            "prefer_websockets": False, "supports_search_tool": False, "service_tiers": [],
            "minimal_client_version": "0.0.0"}


# ── 11. Gemini dialect and envelope ───────────────────────────────────────
# Google's generateContent, bare (API key) or wrapped by Cloud Code in
# {"project", "model", "request": {...}}, answers in {"response": {...}}.
# Private and undocumented behind Cloud Code; state of September 2026.
#
# [G1] Unknown keys in a request are a 400; nothing of the client's leaks in.
# [G2] A chunk's parts are to be appended; a functionCall comes whole; usage is cumulative.
# [G3] finishReason is STOP although calls were made; Claude's calls end in OTHER too.
# [G4] The number of functionResponses must be that of the calls, all in the next turn.
# [G5] Gemini 3 demands the signature on the first functionCall of each step of the open turn;
#      `skip_thought_signature_validator` stands in for one that was lost (Google's docs).
# [G6] Claude demands signed thoughts first in the open tool loop, or no thinking at all.
# [G7] Omitting thinkingConfig does not switch thinking off; budget 0 does, where allowed.
# [G8] Metering and signatures belong to the deployment: they do not travel between providers.

SKIP_SIGNATURE = "skip_thought_signature_validator"


def _family(model: Model) -> str:
    return "c" if model.family == "claude" else "g"


def _wanted_budget(wish: ThinkingWish, model: Model) -> int | None:
    """Thinking tokens: 0 is off, -1 lets the model decide, None where nothing is to be said."""
    if model.max_budget == 0:
        return None
    if wish.effort == "auto":
        return 0 if model.family == "claude" else model.default_budget
    if wish.is_on is False:
        return model.min_budget if model.family.startswith("gemini") else 0     # [G7]
    if wish.budget_tokens is not None:
        budget = wish.budget_tokens
    elif wish.effort in EFFORT_BUDGETS:
        is_most = wish.effort in ("xhigh", "max")
        budget = model.max_budget if is_most else EFFORT_BUDGETS[wish.effort]
    elif wish.is_on:
        budget = model.default_budget
    else:
        return model.min_budget if model.family.startswith("gemini") else 0
    if budget == 0 and model.family == "claude":
        return 0
    return budget if budget < 0 else min(max(budget, model.min_budget), model.max_budget)


def _level(budget: int, levels: list[str]) -> str:
    """The thinking level for a budget, rounded up to one the model has."""
    budget = budget if budget >= 0 else 1 << 30
    wanted = next(name for most, name in LEVEL_BY_BUDGET if budget <= most)
    order = [name for _, name in LEVEL_BY_BUDGET]
    return next((name for name in order[order.index(wanted):] if name in levels), levels[-1])


GEMINI_MORE = {"seed": "seed", "presence_penalty": "presencePenalty",
               "frequency_penalty": "frequencyPenalty"}     # known to the Gemini API only


def _generation_config(request: Request, target: Target, may_think: bool) -> tuple[dict, bool]:
    """(generationConfig, whether the model will think): limits, sampling and thinking depend on
    each other, differently for Claude and Gemini."""
    model, config = target.model, {}
    budget = _wanted_budget(request.thinking, model)
    limit = model.output_tokens
    most = min(max(request.max_tokens, 1), limit) if request.max_tokens is not None else limit
    levels = [] if target.provider.envelope == "antigravity" else model.levels.split()
    if model.family == "claude":
        budget = budget if may_think else 0
        if budget and most <= budget:       # Claude refuses a limit within the budget
            most = min(limit, budget + most)
            budget = min(budget, most - 1024)
        is_thinking = bool(budget and budget >= 1024)
        config["maxOutputTokens"] = most
        config["thinkingConfig"] = {"includeThoughts": is_thinking,
                                    "thinkingBudget": budget if is_thinking else 0}
    else:
        is_thinking = bool(budget)
        is_open_ended = budget is not None and (budget < 0 or bool(levels))
        config["maxOutputTokens"] = limit if is_open_ended else min(limit, most + (budget or 0))
        if budget is not None:
            thinking = {"includeThoughts": request.thinking.is_shown}
            config["thinkingConfig"] = ({**thinking, "thinkingLevel": _level(budget, levels)}
                                        if levels else {**thinking, "thinkingBudget": budget})
    is_claude_thinking = model.family == "claude" and is_thinking
    if request.temperature is not None and not is_claude_thinking:
        config["temperature"] = request.temperature
    if request.top_p is not None and not (is_claude_thinking and request.top_p < 0.95):
        config["topP"] = request.top_p
    if request.top_k is not None and model.family != "claude":
        config["topK"] = request.top_k
    if not target.provider.envelope:
        config.update({wire: request.more[name] for name, wire in GEMINI_MORE.items()
                       if name in request.more})
    if model.family == "image":
        config["responseModalities"] = ["TEXT", "IMAGE"]
    return config, is_thinking


MOST_KEPT = 3       # forms of one turn: for as many kinds of models in one conversation


class _Contents:
    """Turns -> `contents` for one target.  `names` maps call ids to the tools' upstream names,
    `sent` are the signatures that went along, `mended` counts what was changed."""

    def __init__(self, target: Target, signatures: Any, is_thinking: bool, repairs: frozenset,
                 mended: Mended):
        self.target, self.signatures, self.mended = target, signatures, mended
        self.is_claude = target.model.family == "claude"
        self.is_thinking, self.repairs = is_thinking, repairs
        self.sends_ids = target.model.family in ("claude", "gemini3", "gpt-oss")
        self.names: dict[str, str] = {}
        self.sent: list[str] = []
        self.told: dict[int, tuple] = {}        # see Rendered

    def render(self, turns: list[Turn]) -> list[dict]:
        """The contents.  A turn that comes in every request of a conversation is rendered and
        encoded once, but for what depends on signatures: those may be learned meanwhile."""
        kind = "gemini", self.target.model.family, bool(self.target.provider.envelope)
        out = []
        for turn in turns:
            if turn.kept is None or self.repairs:
                out.append(self._content(turn))
                continue
            row = turn.kept.get(kind)
            if row is None:
                row = self._lasting(turn)
                if len(turn.kept) > MOST_KEPT:
                    turn.kept.clear()
                turn.kept[kind] = row
            if not row:
                out.append(self._content(turn))
                continue
            content, _, names = row
            self.names.update(names)
            self.told[id(content)] = row
            out.append(content)
        if self.told:
            self.told[id(out)] = out, None
        return out

    def _content(self, turn: Turn) -> dict:
        if turn.role == "assistant":
            return {"role": "model", "parts": self._model_parts(turn)}
        return {"role": "user", "parts": self._user_parts(turn)}

    def _lasting(self, turn: Turn) -> tuple:
        """(content, its JSON, names of its calls), () where it will not stay as it is."""
        if any(isinstance(b, Thinking) or isinstance(b, ToolCall) and not self.is_claude
               for b in turn.blocks):
            return ()
        content = self._content(turn)
        return content, json_encode(content), {
            b.id: self.names[b.id] for b in turn.blocks if isinstance(b, ToolCall)}

    def _call_id(self, call_id: str) -> dict:
        if not self.sends_ids:
            return {}
        return {"id": tool_id(call_id) if self.is_claude else call_id}

    def _model_parts(self, turn: Turn) -> list[dict]:
        thoughts, in_order, has_call = [], [], False
        pending = ""            # a carried signature waits for the next call
        for block in turn.blocks:
            if isinstance(block, Thinking):
                signature = thought_signature(block, self.signatures,
                                              _family(self.target.model),
                                              self.target.provider.signature_tag)
                if signature and signature.kind == "f":
                    pending = signature.raw
                elif signature and self.is_claude and self._may_sign(signature.raw):
                    thoughts.append(self._signed({"text": block.text, "thought": True},
                                                 signature.raw))
                else:
                    self.mended["thoughts of other models left out"] += bool(block.text)
            elif isinstance(block, ToolCall):
                in_order.append(self._call_part(block, pending, not has_call))
                pending, has_call = "", True
            elif isinstance(block, Text):
                in_order.append({"text": block.text})
            elif isinstance(block, Media):
                in_order.append({"text": f"[{block.media_type}]"})
        if self.is_claude:      # thoughts first, then texts, then calls
            in_order.sort(key=lambda part: "functionCall" in part)
        return thoughts + in_order or [{"text": "."}]

    def _may_sign(self, raw: str) -> bool:
        signs = self.is_thinking if self.is_claude else self.target.model.family in (
            "gemini3", "gemini25")
        return signs and "signatures" not in self.repairs and (
            self.signatures.get(content_key("bad", raw)) is None)

    def _signed(self, part: dict, raw: str) -> dict:
        self.sent.append(raw)
        return {**part, "thoughtSignature": raw}

    def _call_part(self, call: ToolCall, pending: str, is_first: bool) -> dict:
        name = self.names[call.id] = tool_name(call.name)
        if "calls_as_text" in self.repairs:
            return {"text": f"[called {name} with {json_encode(call.arguments)}]"}
        part: dict = {"functionCall": {"name": name, "args": call.arguments,
                                       **self._call_id(call.id)}}
        if self.is_claude:
            return part
        known = self.signatures.get(call.id)
        home = _family(self.target.model), self.target.provider.signature_tag
        raw = pending or (known[2] if known and known[:2] == home else "")
        if raw and self._may_sign(raw):
            return self._signed(part, raw)
        if is_first and self.target.model.family == "gemini3":
            self.mended["lost signatures stood in for"] += 1
            part["thoughtSignature"] = SKIP_SIGNATURE       # [G5]
        return part

    def _user_parts(self, turn: Turn) -> list[dict]:
        results, media, others = [], [], []
        for block in turn.blocks:
            if isinstance(block, ToolResult):
                results.append(self._result_part(block, media))
            elif isinstance(block, Media):
                others.append(self._media_part(block))
            elif not is_blank(block):
                others.append({"text": block.text})
        return results + media + others or [{"text": "."}]

    def _media_part(self, block: Media) -> dict:
        if self.target.model.family == "gpt-oss":
            return {"text": f"[{block.media_type} left out: this model takes no images]"}
        if block.url:
            kind = {} if block.media_type.endswith("*") else {"mimeType": block.media_type}
            return {"fileData": {"fileUri": block.url, **kind}}
        return {"inlineData": {"mimeType": block.media_type, "data": block.data}}

    def _result_part(self, result: ToolResult, media: list[dict]) -> dict:
        text = "\n".join(b.text for b in result.blocks if isinstance(b, Text))
        images = [self._media_part(b) for b in result.blocks if isinstance(b, Media)]
        name = self.names.get(result.call_id, "unknown")
        inline = self.target.model.family == "gemini3" and not self.target.provider.envelope
        if images and not inline:
            media.extend(images)
            text += "".join(f"\n[file {n + 1} of {len(images)} follows]"
                            for n in range(len(images)))
        if result.is_error:
            response = {"error": text.strip("\n") if text.strip() else "failed without output"}
        else:
            response = {"result": text.strip("\n") or ("(image)" if images else "(no output)")}
        if "calls_as_text" in self.repairs:
            return {"text": f"[{name} answered: {json_encode(response)}]"}
        answer = {"name": name, "response": response, **self._call_id(result.call_id)}
        if images and inline:
            answer["parts"] = images
        return {"functionResponse": answer}


def _declaration(tool: Tool, is_claude: bool, hardens: bool,
                 simplify: Callable[[dict], dict] | None = None) -> dict:
    schema = clean_schema(tool.schema, is_claude)
    schema = simplify(schema) if simplify else schema
    description = tool.description
    if hardens and schema.get("properties"):
        description += "\n" + parameter_line(schema)
    return {"name": tool_name(tool.name), "description": description, "parameters": schema}


def _declarations(request: Request, target: Target, repairs: frozenset, told: dict) -> list[dict]:
    """Tools as Gemini knows them; those of a conversation are cleaned and encoded once."""
    is_claude, out = target.model.family == "claude", []
    kind = "gemini", is_claude, target.hardens_tools
    for position, tool in enumerate(request.tools):
        simplify = None
        if repairs & {"bare_schemas", f"bare_schema {position}"}:
            simplify = bare_schema
        elif "core_schemas" in repairs:
            simplify = core_schema
        if simplify or tool.kept is None:
            out.append(_declaration(tool, is_claude, target.hardens_tools, simplify))
            continue
        row = tool.kept.get(kind)
        if row is None:
            declared = _declaration(tool, is_claude, target.hardens_tools)
            row = tool.kept[kind] = declared, json_encode(declared)
        told[id(row[0])] = row
        out.append(row[0])
    if told:
        told[id(out)] = out, None
    return out


def _tool_fields(request: Request, target: Target, repairs: frozenset, told: dict) -> dict:
    """`tools` and `toolConfig`; neither where no tool may be called: mode NONE is ignored."""
    mode, name = request.tool_choice
    if not request.tools or mode == "none" or target.model.family == "image":
        return {}
    row = {"functionDeclarations": _declarations(request, target, repairs, told)}
    calling: dict = {"mode": "ANY" if mode in ("any", "tool") else "VALIDATED"
                     if target.model.family == "claude" else "AUTO"}
    if mode == "tool":
        calling["allowedFunctionNames"] = [tool_name(name)]
    fields = {"tools": [row], "toolConfig": {"functionCallingConfig": calling}}
    if told:
        told.update({id(part): (part, None) for part in (row, fields["tools"])})
    return fields


def can_search(model: Model, provider: Provider, wish: SearchWish) -> bool:
    """Whether this upstream searches the web, or fetches pages, for a model of its own."""
    return model.family.startswith("gemini") and (
        wish.tool == "web_search" or not provider.envelope)


def _add_text(contents: list[dict], text: str) -> None:
    """The last content is not changed in place: it may be one that is kept."""
    last = contents[-1]
    contents[-1] = {**last, "parts": [*last["parts"], {"text": text}]}


def _search_fields(wish: SearchWish, target: Target, contents: list[dict]) -> dict:
    """`tools` of a search; domains go as hints into the last text."""
    hints = [f"site:{d}" for d in wish.allowed] + [f"-site:{d}" for d in wish.blocked]
    if hints:
        _add_text(contents, "Search with: " + " ".join(hints))
    if wish.tool == "web_fetch":
        return {"tools": [{"urlContext": {}}]}
    is_hub = target.provider.envelope == "antigravity"
    return {"tools": [{"googleSearch": {"enhancedContent": {"imageSearch": {"maxResultCount": 5}}}
                       if is_hub else {}}]}


def _cited_spans(raw: bytes, sources: list, rows: Any) -> list[tuple[int, int, list]]:
    """(begin, end, sources) of each cited stretch of the text, in its order.  Segments are told in
    bytes of UTF-8; ends inside a character are moved out of it."""
    cited: dict[tuple[int, int], list] = {}
    for row in objects_of(rows):
        segment, named = object_of(row.get("segment")), row.get("groundingChunkIndices")
        begin, end = (segment.get(n) or 0 for n in ("startIndex", "endIndex"))
        if not (isinstance(begin, int) and isinstance(end, int) and 0 <= begin < end <= len(raw)):
            continue
        while begin and raw[begin] & 0xC0 == 0x80:
            begin -= 1
        while end < len(raw) and raw[end] & 0xC0 == 0x80:
            end += 1
        found = [sources[i] for i in (named if isinstance(named, list) else ())
                 if isinstance(i, int) and 0 <= i < len(sources) and sources[i][0]]
        cited.setdefault((begin, end), []).extend(found)
    return [(begin, end, list(dict.fromkeys(found))) for (begin, end), found in
            sorted(cited.items(), key=lambda item: (item[0][1], item[0][0])) if found]


def _cited_text(raw: bytes, spans: Iterable[tuple]) -> list[tuple[Kind, Any]]:
    """The text in pieces, those that rest on sources with their citations."""
    pieces: list[tuple[Kind, Any]] = []
    done = 0
    for begin, end, named in spans:
        begin = max(begin, done)        # what overlaps is cited from where the one before ended
        if begin >= end:
            continue
        if raw[done:begin].strip():
            pieces += [(Kind.TEXT, raw[done:begin].decode("utf-8")), (Kind.BLOCK_END, None)]
            done = begin
        cited = raw[begin:end].decode("utf-8")
        pieces += [(Kind.TEXT, raw[done:end].decode("utf-8")),
                   *((Kind.CITATION, {"url": url, "title": title, "text": cited})
                     for url, title in named), (Kind.BLOCK_END, None)]
        done = end
    return [*pieces, (Kind.TEXT, raw[done:].decode("utf-8"))]


def gemini_place_sources(text: str, grounds: list) -> list[tuple[Kind, Any]]:
    """The calls and results of a search, then its text in pieces with their citations."""
    meta: dict = {}
    for part in grounds:
        meta.update({k: v for k, v in part.items() if v})
    webs = [object_of(c.get("web")) for c in objects_of(meta.get("groundingChunks"))]
    sources = [(str(w.get("uri") or ""), str(w.get("title") or "")) for w in webs]
    found = tuple(dict.fromkeys(source for source in sources if source[0]))
    queries = meta.get("webSearchQueries")
    queries = [q for q in queries if isinstance(q, str)] if isinstance(queries, list) else []
    pieces: list[tuple[Kind, Any]] = []
    for n, query in enumerate(queries or [""] * bool(found)):
        call_id = new_id("srvtoolu_agp")
        pieces += [(Kind.SERVER_CALL, ToolCall(call_id, "web_search", {"query": query})),
                   (Kind.FOUND, Found(call_id, "web_search", () if n else found))]
    raw = text.encode("utf-8", "replace")
    spans = _cited_spans(raw, sources, meta.get("groundingSupports"))
    return [*pieces, *_cited_text(raw, spans), (Kind.METER, {"searches": len(queries)})]


def _enveloped(request: Request, target: Target, inner: dict) -> dict:
    """The body as Cloud Code wraps it, where the provider is behind that: `inner` gets a member."""
    if not target.provider.envelope:
        return inner
    # groups a conversation's turns for the upstream's prompt cache: a signed 63-bit number
    session = "-" + str(int(request.conversation[:16], 16) & (2 ** 63 - 1))
    if target.provider.envelope == "gemini-cli":
        body = {"model": target.upstream_id, "project": target.project,
                "user_prompt_id": f"{session}########{random_bytes()[:4].hex()}",
                "request": inner}
        inner["session_id"] = session
    else:
        body = {"project": target.project, "requestId": "agent-" + random_bytes()[:16].hex(),
                "model": target.upstream_id, "userAgent": "antigravity",
                "requestType": "image_gen" if target.model.family == "image" else
                "web_search" if request.search else "agent",
                "request": inner}
        inner["sessionId"] = session
    if not target.project:
        del body["project"]
    return body


KEPT_SYSTEM = range(1000, 100_000)      # letters of a system text that is worth keeping, bounded


def _instruction(texts: tuple, is_enveloped: bool) -> dict:
    return {"parts": [{"text": text} for text in texts],
            **({"role": "user"} if is_enveloped else {})}


@functools.lru_cache(maxsize=64)
def _kept_instruction(texts: tuple, is_enveloped: bool) -> tuple[dict, str]:
    """A systemInstruction, which is shared and must not be changed, and its JSON."""
    made = _instruction(texts, is_enveloped)
    return made, json_encode(made)


def _told_instruction(texts: tuple, target: Target, told: dict) -> dict:
    """The systemInstruction; that of a conversation is made and encoded once."""
    is_enveloped = bool(target.provider.envelope)
    if not told or sum(map(len, texts)) not in KEPT_SYSTEM:
        return _instruction(texts, is_enveloped)
    row = _kept_instruction(texts, is_enveloped)
    told[id(row[0])] = row
    return row[0]


def gemini_render_request(request: Request, target: Target, signatures: Any,
                          repairs: frozenset = frozenset()) -> Rendered:
    """The upstream body of a request.  `signatures` maps client tool ids and `content_key`s to
    (family, tag, raw); `repairs` name what a refusal asks to be done otherwise: `signatures`,
    `calls_as_text`, `no_budget`, `core_schemas`, `bare_schemas`, `bare_schema N`, `old_media`."""
    model, mended = target.model, Mended()
    more_system, turns = repair_turns(request.turns, mended)
    turns = drop_old_media(turns) if "old_media" in repairs else turns
    forced = request.tool_choice[0] in ("any", "tool")      # Anthropic forbids both at once
    may_think = not (model.family == "claude" and (         # [G6]
        forced or "signatures" in repairs or has_unsigned_open_loop(
            turns, signatures, "c", target.provider.signature_tag)))
    config, is_thinking = _generation_config(request, target, may_think)
    if "no_budget" in repairs:
        config.pop("thinkingConfig", None)
    contents = _Contents(target, signatures, is_thinking, repairs, mended)
    inner: dict = {"contents": contents.render(turns)}
    system = request.system + tuple(more_system)
    if system and model.family == "image":      # takes no system instruction
        first = inner["contents"][0]
        inner["contents"][0] = {**first, "parts": [{"text": t} for t in system] + first["parts"]}
    elif system:
        inner["systemInstruction"] = _told_instruction(system, target, contents.told)
    if request.search:
        inner.update(_search_fields(request.search, target, inner["contents"]))
    elif "calls_as_text" not in repairs:
        inner.update(_tool_fields(request, target, repairs, contents.told))
    if request.json_schema is not None:
        if model.family == "gemini3" or (model.family == "gemini25" and "tools" not in inner):
            config["responseMimeType"] = "application/json"
            if request.json_schema != ANY_OBJECT and target.provider.envelope:
                config["responseSchema"] = clean_answer_schema(request.json_schema)
            elif request.json_schema != ANY_OBJECT:
                config["responseJsonSchema"] = request.json_schema
        else:
            _add_text(inner["contents"], schema_order(request.json_schema))
    inner["generationConfig"] = config
    shape = answer_shape(request, turns, mended, _family(model), target.provider.signature_tag,
                         signatures)
    if request.search:
        shape = shape._replace(place_sources=gemini_place_sources)
    is_claude_thinking = (target.provider.envelope == "antigravity" and is_thinking
                          and model.family == "claude")
    beta = {"anthropic-beta": "interleaved-thinking-2025-05-14"} if is_claude_thinking else {}
    body = _enveloped(request, target, inner)
    if contents.told:
        contents.told.update({id(part): (part, None) for part in (body, inner)})
    return Rendered(body, beta, shape, mended, tuple(contents.sent), contents.told)


def gemini_model_path(target: Target) -> str:
    """The path of a model: on Vertex by project and place, where those are known."""
    model = urllib.parse.quote(target.upstream_id)
    if target.provider.catalogue != "vertex":
        return f"/v1beta/models/{model}"
    project, _, place = target.project.partition("/")
    where = f"projects/{project}/locations/{place or 'global'}/" if project else ""
    return f"/v1/{where}publishers/google/models/{model}"


def gemini_path(target: Target, request: Request) -> str:
    if target.provider.envelope:
        return "/v1internal:streamGenerateContent?alt=sse"
    is_whole = request.is_native_to(target.provider) and not request.is_streaming
    verb = "generateContent" if is_whole else "streamGenerateContent?alt=sse"
    return f"{gemini_model_path(target)}:{verb}"


# Answers

_FINISH = {         # finishReason -> Stop, None for "nothing usable"
    "STOP": Stop.END, "MAX_TOKENS": Stop.LENGTH, "TOOL_USE": Stop.TOOL,
    "OTHER": Stop.END, "FINISH_REASON_UNSPECIFIED": Stop.END,       # [G3]
    **dict.fromkeys(("SAFETY", "RECITATION", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "LANGUAGE",
                     "MODEL_ARMOR", "IMAGE_SAFETY", "IMAGE_PROHIBITED_CONTENT", "IMAGE_RECITATION",
                     "IMAGE_OTHER", "NO_IMAGE"), Stop.REFUSAL),
    **dict.fromkeys(("MALFORMED_FUNCTION_CALL", "UNEXPECTED_TOOL_CALL", "TOO_MANY_TOOL_CALLS",
                     "MALFORMED_RESPONSE"), None),
}


_SCAN = json.JSONDecoder(parse_constant=refuse_constant, parse_float=finite).scan_once


def gemini_parse_usage(meta: Mapping) -> dict[str, int]:
    """The counters this usageMetadata has; missing ones keep what an earlier chunk said."""
    extra = meta.get("toolUsePromptTokenCount") or 0
    prompt, total = meta.get("promptTokenCount") or 0, meta.get("totalTokenCount") or 0
    found = {"input": prompt + extra, "cached": meta.get("cachedContentTokenCount"),
             "visible": meta.get("candidatesTokenCount"),
             "thinking": meta.get("thoughtsTokenCount"),
             "output": total - prompt - extra if total and prompt else 0}
    return {name: count for name, count in found.items() if isinstance(count, int) and count > 0}


def _parse_part(part: Mapping, pieces: list[tuple[Kind, Any]]) -> None:
    text = part.get("text")
    if text is not None:
        if not isinstance(text, str):
            raise TypeError("text")
        signature = part.get("thoughtSignature")
        if part.get("thought"):
            pieces.append((Kind.THINKING, text))
        elif text:
            pieces.append((Kind.TEXT, text))
        if signature:
            pieces.append((Kind.SIGNATURE, (signature, bool(part.get("thought")))))
        return
    call = part.get("functionCall")
    if call is not None:
        arguments = call.get("args")
        pieces.append((Kind.CALL, ToolCall(str(call.get("id") or ""), str(call.get("name") or ""),
                                           arguments if isinstance(arguments, dict) else {},
                                           part.get("thoughtSignature") or "")))
    elif part.get("thoughtSignature"):
        pieces.append((Kind.SIGNATURE, (part["thoughtSignature"], bool(part.get("thought")))))
    elif part.get("inlineData"):
        image = part["inlineData"]
        pieces.append((Kind.IMAGE, (str(image.get("mimeType")), str(image.get("data") or ""))))
    elif part.get("executableCode"):
        pieces.append((Kind.TEXT, f"```\n{part['executableCode'].get('code', '')}\n```\n"))
    elif part.get("codeExecutionResult"):
        pieces.append((Kind.TEXT, f"```\n{part['codeExecutionResult'].get('output', '')}\n```\n"))


def gemini_parse_event(text: str) -> list[tuple[Kind, Any]]:
    """Loose pieces of one event.  Raises UpstreamFault for an error object, ValueError for what is
    not an event at all."""
    try:
        event, _ = _SCAN(text, 0)
    except (StopIteration, RecursionError) as err:
        raise ValueError("not JSON") from err
    if isinstance(event, list) and event:
        event = event[0]
    if not isinstance(event, dict):
        raise ValueError("not an object")
    if event.get("error"):
        raise UpstreamFault(event)
    body = event.get("response", event)
    pieces: list[tuple[Kind, Any]] = []
    try:
        for candidate in body.get("candidates") or ():
            for part in (candidate.get("content") or {}).get("parts") or ():
                _parse_part(part, pieces)
            if candidate.get("groundingMetadata"):
                pieces.append((Kind.GROUNDS, object_of(candidate["groundingMetadata"])))
            word = candidate.get("finishReason")
            if word == "MISSING_THOUGHT_SIGNATURE":     # a 400 of its own kind, told in the stream
                raise UpstreamFault({"error": {"code": 400,
                                               "message": "missing thought_signature"}})
            if word:
                stop = _FINISH.get(word, Stop.END)
                note = candidate.get("finishMessage") or word
                pieces.append((Kind.FINISH, (stop, note)))
            break                   # one candidate is asked for
        blocked = (body.get("promptFeedback") or {}).get("blockReason")
        if blocked:
            pieces.append((Kind.FINISH, (Stop.REFUSAL, blocked)))
        meta = body.get("usageMetadata")
        usage = gemini_parse_usage(meta) if meta else {}
    except (AttributeError, TypeError) as err:
        raise ValueError("not of the expected shape") from err
    if usage:
        pieces.insert(0, (Kind.METER, usage))
    return pieces


_DETAIL = r'\{"modality":"\w+","tokenCount":COUNT\}'


class GeminiPlain(PlainEvents):
    """Those of the Gemini API and of Cloud Code: members stand in the orders in which the services
    send them."""
    form = (r'(\{"response":)?\{"candidates":\[\{"content":\{(?:"role":"model",)?"parts":\[\{'
            rf'"text":"(?P<text>{PLAIN_TEXT})"(?P<thinks>,"thought":true)?\}}\](?:,"role":"model")?'
            r'\}(?:,"index":0)?\}\](?:,"usageMetadata":(?P<usage>\{"promptTokenCount":COUNT'
            r'(?:,"(?:cachedContent|candidates|thoughts|total)TokenCount":COUNT'
            r'|,"(?:prompt|cache|candidates)TokensDetails":DETAILS|,"trafficType":"\w+")*\}))?'
            r'(?P<rest>(?:,"(?:modelVersion|responseId|createTime)":"[^"\\\x00-\x1f]*")*\}(?(1)'
            r'(?:,"traceId":"[^"\\\x00-\x1f]*")?(?:,"metadata":\{\})?\}|))'
            ).replace("DETAILS", rf"\[(?:{_DETAIL}(?:,{_DETAIL})*)?\]").replace("COUNT", COUNT)
    _SOURCES = {"input": "prompt", "cached": "cachedContent", "visible": "candidates",
                "thinking": "thoughts", "output": "total"}

    def counts(self, usages: list[str]) -> dict[str, int]:
        """The last tells all that the others did, unless it lacks what one of them has."""
        last = gemini_parse_usage(_SCAN(usages[-1], 0)[0])
        told = "" if len(usages) == 1 or self.is_whole(last) else "".join(usages[:-1])
        if not told or all(name in last or source + "TokenCount" not in told
               for name, source in self._SOURCES.items()):
            return last
        merged: dict[str, int] = {}
        for usage in usages:
            merged.update(gemini_parse_usage(_SCAN(usage, 0)[0]))
        return merged

    def is_whole(self, counts: Mapping[str, int]) -> bool:
        return len(counts) == len(self._SOURCES)


# Requests of Gemini clients

_GEMINI_ROLES = {None: "user", "user": "user", "function": "user", "model": "assistant"}
_SNAKE = re.compile(r"(?<!^)(?=[A-Z])")


def _told(row: Mapping, name: str) -> Any:
    """A member under its name, or as proto3 JSON writes it too: in snake case."""
    value = row.get(name)
    return value if value is not None else row.get(_SNAKE.sub("_", name).lower())


def gemini_unwrap(text: Any) -> str:
    """A signature as our own envelope, which Gemini's clients get in base64; others as they are."""
    if not isinstance(text, str) or not text.startswith("YWdwMS"):
        return text if isinstance(text, str) else ""
    with contextlib.suppress(ValueError):       # it only begins like one
        return base64.b64decode(text.translate(_URL_SAFE) + "=" * (-len(text) % 4)).decode("utf-8")
    return text


def gemini_wrap(signature: str) -> str:
    return base64.b64encode(signature.encode("utf-8", "replace")).decode("ascii")


def json_schema_of(node: Any, depth: int = 0) -> Any:
    """JSON Schema of Google's own kind of schema: types in capitals, `nullable`.  Keywords count
    only where a schema stands."""
    if not isinstance(node, dict) or depth > SCHEMA_MAX_DEPTH:
        return node
    out = {k: v for k, v in node.items() if k not in (
        "nullable", "propertyOrdering", "property_ordering") and not (
        k == "format" and v == "enum")}
    if isinstance(node.get("type"), str):
        kind = node["type"].lower()
        out["type"] = [kind, "null"] if node.get("nullable") is True else kind
    for word in ("items", "additionalProperties"):
        if word in node:
            out[word] = json_schema_of(node[word], depth + 1)
    if isinstance(node.get("properties"), dict):
        out["properties"] = {n: json_schema_of(v, depth + 1) for n, v in node["properties"].items()}
    for word in ("anyOf", "any_of"):
        if isinstance(node.get(word), list):
            out.pop(word)
            out["anyOf"] = [json_schema_of(v, depth + 1) for v in node[word]]
    for word in ("minItems", "maxItems", "minLength", "maxLength"):     # int64: texts in proto3
        if isinstance(out.get(word), str) and out[word].isdecimal():
            out[word] = int(out[word][:9])
    return out


class _GeminiTurns:
    """`contents` -> turns.  Calls without an id get one, and their answers find it by name and
    order."""

    def __init__(self) -> None:
        self.waiting: dict[str, dict] = {}      # name -> ids of its calls not yet answered
        self.ids: set[str] = set()
        self.calls, self.thought = 0, ""    # the latter: begun, and not yet signed

    def read(self, contents: Any) -> tuple:
        turns: list[Turn] = []
        for position, content in enumerate(list_at(contents, "contents")):
            path = f"contents.{position}"
            role = dict_at(content, path).get("role")
            if not isinstance(role, (str, type(None))) or role not in _GEMINI_ROLES:
                raise invalid(path + ".role", "user or model is required")
            if turns and turns[-1].role != _GEMINI_ROLES[role]:
                self.thought = ""       # nothing followed it
            if role == "model" and turns and turns[-1].role != "assistant":
                self.waiting = {}       # a call that was never answered is not to be answered now
            side, blocks = _GEMINI_ROLES[role], self.parts(content.get("parts"), path)
            if side == "user" and any(isinstance(b, ToolCall) for b in blocks):
                raise invalid(path + ".role", "model is required beside a functionCall")
            turns.append(Turn(side, tuple(b for b in blocks if side != "user"
                                          or not isinstance(b, Thinking))))
        if not turns:
            raise invalid("contents", "at least one content is required")
        return tuple(turns)

    def parts(self, parts: Any, path: str) -> tuple:
        out: list = []
        rows = [parts] if isinstance(parts, dict) else list_at(parts or [], path + ".parts")
        for position, part in enumerate(rows):
            where = f"{path}.parts.{position}"
            part = {"text": part} if isinstance(part, str) else dict_at(part, where)
            found, held, self.thought = self._part(part, where), self.thought, ""
            if part.get("thought") is True and found:   # it came in pieces, signed with the last
                found = [Thinking(held + found[0].text, found[0].signature)]
                if not found[0].signature:
                    self.thought = found.pop().text
            elif held:
                found.insert(0, Thinking(held, ""))
            out += found
        return tuple(out)

    def _part(self, part: dict, path: str) -> list:
        signature = gemini_unwrap(_told(part, "thoughtSignature") or "")
        if part.get("text") is not None:
            text = text_at(part["text"], path + ".text")
            if part.get("thought") is True:
                return [Thinking(text, signature)]
            return [Text(text)] * bool(text)
        for name, read in (("functionCall", self._call), ("functionResponse", self._answer),
                           ("inlineData", self._media), ("fileData", self._file)):
            value = _told(part, name)
            if value is not None:
                carried = [Thinking("", signature)] if signature and name == "functionCall" else []
                return carried + [read(dict_at(value, f"{path}.{name}"), f"{path}.{name}")]
        for name, member in (("executableCode", "code"), ("codeExecutionResult", "output")):
            told = object_of(_told(part, name)).get(member)
            if told:
                return [Text(f"```\n{told}\n```")]
        return []

    def _call(self, call: dict, path: str) -> ToolCall:
        name, self.calls = text_at(call.get("name"), path + ".name"), self.calls + 1
        call_id = str(call.get("id") or f"{tool_id(name)}-{self.calls}")
        self.waiting.setdefault(name, {})[call_id] = None
        self.ids.add(call_id)
        arguments = dict_at(call.get("args") or {}, path + ".args")
        if json_depth_exceeds(arguments):
            raise invalid(path + ".args", f"nested deeper than {MAX_JSON_DEPTH}")
        return ToolCall(call_id, name, arguments)

    def _answer(self, answer: dict, path: str) -> ToolResult:
        name, given = text_at(answer.get("name") or "", path + ".name"), str(answer.get("id") or "")
        waiting = self.waiting.get(name, {})
        match = given if given in self.ids else next(iter(waiting), "")
        waiting.pop(match, None)
        told = dict(dict_at(answer.get("response") or {}, path + ".response"))
        if told.keys() == {"name", "content"} and told["name"] == name:
            del told["name"]            # Vercel's SDK repeats it there
        key = next((k for k in ("error", "output", "result", "content") if told.keys() == {k}), "")
        text = told[key] if key and isinstance(told[key], str) else json_encode(
            told[key] if key else told) if told else ""
        media = [self._media(dict_at(_told(row, "inlineData"), path), path)
                 for row in objects_of(answer.get("parts")) if _told(row, "inlineData")]
        return ToolResult(match or given or name, (Text(text), *media), key == "error")

    @staticmethod
    def _media(data: dict, path: str) -> Media:
        return media_of_data(data.get("data"), _told(data, "mimeType"), path + ".data",
                             str(_told(data, "displayName") or ""))

    @staticmethod
    def _file(data: dict, path: str) -> Media:
        return media_of_url(_told(data, "fileUri"), str(_told(data, "mimeType") or "image/*"),
                            path + ".fileUri")


_GEMINI_MODES = {"AUTO": "auto", "ANY": "any", "NONE": "none", "VALIDATED": "auto",
                 "MODE_UNSPECIFIED": "auto"}


def _tools_of(row: Mapping, path: str, is_kept: bool) -> tuple[list[Tool], list[str]]:
    """(tools of the client's own, names of Google's) of an item of `tools`."""
    tools, hosted = [], []
    for name, value in row.items():
        if name not in ("functionDeclarations", "function_declarations"):
            hosted.append(_SNAKE.sub("_", name).lower())
            continue
        for n, told in enumerate(list_at(value, f"{path}.{name}")):
            where = f"{path}.{name}.{n}"
            schema = json_schema_of(_told(dict_at(told, where), "parametersJsonSchema")
                                    or told.get("parameters")) or {}
            label = text_at(told.get("name"), where + ".name")
            tools.append(Tool(label, str(told.get("description") or ""),
                              dict_at(schema, where + ".parameters"),
                              kept={} if is_kept else None))
    return tools, hosted


def _gemini_tools(body: Mapping) -> dict:
    """Fields of the Request about tools."""
    tools: dict[str, Tool] = {}
    hosted: list[str] = []
    rows = body.get("tools") or []
    made = getattr(rows, "made", ())
    for position, row in enumerate([rows] if isinstance(rows, dict) else list_at(rows, "tools")):
        path, known = f"tools.{position}", made[position] if position < len(made) else None
        if known is None or known[0] is not _GEMINI_ROLES:
            known = _GEMINI_ROLES, _tools_of(dict_at(row, path), path, position < len(made))
            if position < len(made):
                made[position] = known
        found, others = known[1]
        hosted += others
        for tool in found:
            tools[tool.name] = tool
    config = object_of(_told(object_of(_told(body, "toolConfig")), "functionCallingConfig"))
    mode = str(config.get("mode") or "AUTO").upper()
    if mode not in _GEMINI_MODES:
        raise invalid("toolConfig.functionCallingConfig.mode", "AUTO, ANY, NONE or VALIDATED")
    path = "toolConfig.functionCallingConfig.allowedFunctionNames"
    names = [n for n in list_at(_told(config, "allowedFunctionNames") or [], path)
             if text_at(n, path) in tools]
    if names and mode in ("ANY", "VALIDATED"):
        tools = {n: t for n, t in tools.items() if n in names}
    choice = ("tool", names[0]) if mode == "ANY" and len(names) == 1 else (_GEMINI_MODES[mode], "")
    wish = None
    if not tools and {"google_search", "google_search_retrieval"} & set(hosted):
        wish = SearchWish("web_search")
    elif not tools and "url_context" in hosted:
        wish = SearchWish("web_fetch")
    return {"tools": tuple(tools.values()), "tool_choice": choice, "search": wish,
            "left_out": () if wish else tuple(hosted)}


def _gemini_wish(config: Mapping, model: str) -> ThinkingWish:
    told = object_of(_told(config, "thinkingConfig"))
    shows = _told(told, "includeThoughts") is True
    _, wish = model_variant(model)
    if wish:
        return replace(wish, shows=shows)
    budget, level = _told(told, "thinkingBudget"), _told(told, "thinkingLevel")
    if type(budget) is int and budget >= 0:
        return ThinkingWish(budget > 0, budget or None, shows=shows)
    if isinstance(level, str) and level.lower() in EFFORT_BUDGETS:
        return ThinkingWish(True, None, level.lower(), shows=shows)
    if budget == -1:
        return ThinkingWish(True, shows=shows)
    return ThinkingWish(None, None, "auto", shows=shows)


def _gemini_fields(body: Mapping, model: str) -> dict:
    """The fields of the Request; ProxyError where other dialects cannot take it."""
    config = _told(body, "generationConfig")
    config = dict_at(config, "generationConfig") if config is not None else {}
    given = {_SNAKE.sub("_", name).lower(): value for name, value in config.items()}
    if given.get("candidate_count") not in (None, 1):
        raise invalid("generationConfig.candidateCount", "only one candidate is supported")
    path = "generationConfig.responseModalities"
    if {str(m).upper() for m in list_at(given.get("response_modalities") or [], path)} - {
            "TEXT", "IMAGE"}:
        raise invalid(path, "only text is supported")
    if _told(body, "cachedContent"):
        raise invalid("cachedContent", "not supported by this model's provider")
    reading = _GeminiTurns()
    turns = reading.read(body.get("contents"))
    system = _told(body, "systemInstruction")
    system = {"parts": system} if isinstance(system, (str, list)) else object_of(system)
    if isinstance(system.get("parts"), str):
        system = {"parts": [system["parts"]]}
    texts = tuple(b.text for b in reading.parts(system.get("parts"), "systemInstruction")
                  if isinstance(b, Text))
    schema = json_schema_of(given.get("response_json_schema") or given.get("response_schema"))
    if schema is None and given.get("response_mime_type") == "application/json":
        schema = ANY_OBJECT
    stops = list_at(given.get("stop_sequences") or [], "generationConfig.stopSequences")
    most, top_k = given.get("max_output_tokens"), number_at(given, "top_k", 0, 1 << 31)
    if most is not None and (type(most) is not int or most < 0):
        raise invalid("generationConfig.maxOutputTokens", "a whole number is required")
    return {
        **_gemini_tools(body), "turns": turns, "system": texts, "max_tokens": most or None,
        "temperature": number_at(given, "temperature", 0, 2),
        "top_p": number_at(given, "top_p", 0, 1), "top_k": None if top_k is None else int(top_k),
        "stop_sequences": tuple(text_at(s, "generationConfig.stopSequences") for s in stops),
        "thinking": _gemini_wish(config, model), "json_schema": schema if schema is None else
        dict_at(schema, "generationConfig.responseSchema"),
        "more": {n: number_at(given, n, *MORE_FIELDS[n]) for n in GEMINI_MORE
                 if given.get(n) is not None}}


def gemini_parse_request(body: Any, headers: Mapping[str, str], is_count: bool = False,
                         raw: bytes = b"", query: str = "", path: str = "") -> Request:
    """The neutral Request of a body and its path `…/models/{model}:{verb}`.  Names in camel and in
    snake case count.  Raises ProxyError invalid_request; what only Gemini's own API can take stands
    in `refusal`."""
    name, _, verb = path.rpartition(":")
    model = model_at({"model": urllib.parse.unquote(name.partition("/models/")[2] or name)})
    body = dict_at(body, "body")
    inner = _told(body, "generateContentRequest") if is_count else None
    fields = fields_for_others(lambda: _gemini_fields(
        dict_at(inner, "generateContentRequest") if inner else body, model), raw)
    is_sse = dict(urllib.parse.parse_qsl(query)).get("alt") == "sse"
    return Request(
        model=model, wanted=model_variant(model)[0], session=session_key(body, headers),
        is_streaming=verb == "streamGenerateContent", dialect="gemini",
        native=Native("gemini", raw) if raw else None, ext={"is_array": not is_sse},
        **fields)


# Answers to Gemini clients

@dataclass
class GeminiAnswer:
    """What is remembered between the deltas of one answer.  `is_array` writes one JSON list in
    place of events; `call` is the open call, `grounds` what a search found."""
    model: str
    is_array: bool = False
    id: str = field(default_factory=lambda: new_id("r-"))
    begun: bool = False
    count: int = 0                  # chunks so far
    open_kind: Kind | None = None
    call: tuple | None = None       # (id, name, pieces of arguments)
    signature: str = ""             # of the next call
    queries: list = field(default_factory=list)
    sources: dict = field(default_factory=dict)     # (url, title) -> index
    supports: list = field(default_factory=list)
    octets: int = 0                 # bytes of the text so far

    @property
    def content_type(self) -> str:
        return "application/json" if self.is_array else "text/event-stream; charset=utf-8"

    def frame(self, text: str) -> str:
        """A chunk's JSON as it goes out."""
        self.count += 1
        if not self.is_array:
            return f"data: {text}\r\n\r\n"
        return ("[" if self.count == 1 else ",\r\n") + text

    def last(self) -> str:
        return "]" if self.is_array else ""


def gemini_usage(usage: Usage) -> dict:
    prompt = usage.input_tokens + usage.cached_tokens + usage.written_tokens
    visible = max(0, usage.output_tokens - usage.thinking_tokens)
    return {"promptTokenCount": prompt, "cachedContentTokenCount": usage.cached_tokens,
            "candidatesTokenCount": visible, "thoughtsTokenCount": usage.thinking_tokens,
            "totalTokenCount": prompt + usage.output_tokens,
            "promptTokensDetails": [{"modality": "TEXT", "tokenCount": prompt}]}


def _gemini_chunk(state: GeminiAnswer, parts: list[dict], more: Mapping = {},
                  **fields: Any) -> dict:
    candidate = {"content": {"role": "model", "parts": parts}, "index": 0, **more}
    return {"candidates": [candidate], **fields, "modelVersion": state.model,
            "responseId": state.id}


def _gemini_support(state: GeminiAnswer, citation: Mapping) -> None:
    if "url" not in citation:
        return
    source = (str(citation["url"]), str(citation.get("title") or ""))
    index = state.sources.setdefault(source, len(state.sources))
    text = str(citation.get("text") or citation.get("cited_text") or "")
    begin = max(0, state.octets - len(text.encode("utf-8", "replace")))
    state.supports.append({"segment": {"startIndex": begin, "endIndex": state.octets, "text": text},
                           "groundingChunkIndices": [index]})


def _whole_json(parts: list[str]) -> Any:
    """What the pieces of a call's arguments say, None where they are no JSON."""
    told = "".join(parts) or "{}"
    return json.loads(told) if is_json(told) else None


def _gemini_parts(state: GeminiAnswer, delta: Any) -> list[dict]:
    """The parts that a delta completes."""
    if isinstance(delta, BlockStart):
        state.open_kind = delta.kind
        if delta.kind in (Kind.CALL, Kind.SERVER_CALL):
            state.call = (delta.id, delta.name, [])
        elif delta.kind is Kind.FOUND:
            for source in delta.block.sources:
                state.sources.setdefault(source, len(state.sources))
        return []
    if isinstance(delta, BlockEnd):
        call, state.call = state.call, None
        if call and state.open_kind is Kind.CALL:
            arguments = _whole_json(call[2])
            if not isinstance(arguments, dict):     # cut by the limit: nothing to be called
                return []
            part = {"functionCall": {"id": call[0], "name": call[1], "args": arguments}}
            signature, state.signature = state.signature, ""
            return [{**part, "thoughtSignature": signature} if signature else part]
        if call:
            state.queries.append(str(object_of(_whole_json(call[2])).get("query") or ""))
        return []
    if delta.kind is Kind.ARGUMENTS:
        state.call[2].append(delta.text)
    elif delta.kind is Kind.SIGNATURE and delta.text:
        told = unwrap_signature(delta.text)
        if told and told.kind == "f":
            state.signature = gemini_wrap(delta.text)
        else:
            return [{"text": "", "thought": True, "thoughtSignature": gemini_wrap(delta.text)}]
    elif delta.kind is Kind.CITATION:
        _gemini_support(state, json.loads(delta.text))
    elif delta.text:
        is_thought = delta.kind is Kind.THINKING
        state.octets += 0 if is_thought else len(delta.text.encode("utf-8", "replace"))
        return [{"text": delta.text, "thought": True} if is_thought else {"text": delta.text}]
    return []


def _gemini_grounds(state: GeminiAnswer) -> dict:
    if not (state.queries or state.sources):
        return {}
    return {"groundingMetadata": {
        "webSearchQueries": state.queries, "groundingSupports": state.supports,
        "groundingChunks": [{"web": {"uri": url, "title": title}} for url, title in state.sources]}}


def _gemini_end(state: GeminiAnswer, finish: Finish, parts: list[dict]) -> dict:
    more = {"finishReason": STOP_WORDS[finish.stop].gemini, **_gemini_grounds(state)}
    if finish.stop is Stop.REFUSAL and finish.explanation:
        more["finishMessage"] = finish.explanation
    return _gemini_chunk(state, parts, more, usageMetadata=gemini_usage(finish.usage))


GEMINI_WORDS = {400: "INVALID_ARGUMENT", 401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED",
                404: "NOT_FOUND", 405: "INVALID_ARGUMENT", 408: "DEADLINE_EXCEEDED",
                429: "RESOURCE_EXHAUSTED", 500: "INTERNAL", 502: "INTERNAL", 503: "UNAVAILABLE",
                504: "DEADLINE_EXCEEDED"}


def gemini_render_error(error: ProxyError, request_id: str) -> dict:
    status = {529: 503}.get(error.rule.status, error.rule.status)
    body: dict = {"code": status, "message": error.message,
                  "status": GEMINI_WORDS.get(status, "INVALID_ARGUMENT")}
    if error.retry_after_s is not None:
        body["details"] = [{"@type": "type.googleapis.com/google.rpc.RetryInfo",
                            "retryDelay": f"{max(1, int(error.retry_after_s + 0.999))}s"}]
    if error.kind in ("exhausted", "quota") and (error.retry_after_s or 300) >= 300:
        # the Gemini CLI then says so; else, and after these words, it sleeps for hours
        body["message"] = error.message.replace("exhausted your capacity", "used up your capacity")
        body["details"] = [*body.get("details", ()), {
            "@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "QUOTA_EXHAUSTED",
            "domain": "cloudcode-pa.googleapis.com"}]
    return {"error": {**body, **error.details}}


def gemini_render_delta(state: GeminiAnswer, delta: Any) -> str:
    """One neutral delta -> the text of its chunk, "" where nothing is complete yet.  An error
    stands bare on its line: clients look for it there."""
    if isinstance(delta, Begin):
        return ""
    if isinstance(delta, Run):
        return "".join([gemini_render_delta(state, piece) for piece in delta.pieces()])
    if isinstance(delta, Fault):
        text = json_encode(gemini_render_error(delta.error, ""))
        return state.frame(text) + "]" if state.is_array else text + "\n\n"
    if isinstance(delta, Finish):
        return state.frame(json_encode(_gemini_end(state, delta, [{"text": ""}]))) + state.last()
    parts = _gemini_parts(state, delta)
    return state.frame(json_encode(_gemini_chunk(state, parts))) if parts else ""


def gemini_render_reply(state: GeminiAnswer, reply: Reply) -> dict:
    """The whole answer of a fold."""
    parts: list[dict] = []
    for delta in deltas_of(reply)[1:-1]:
        for part in _gemini_parts(state, delta):
            last = parts[-1] if parts else {}
            if "text" in part and last.keys() == part.keys() == {"text"}:
                last["text"] += part["text"]
            else:
                parts.append(part)
    return _gemini_end(state, reply.finish, parts or [{"text": ""}])


def gemini_render_model(model: Model) -> dict:
    """A row of /v1beta/models."""
    return {"name": "models/" + model.id, "version": "001", "displayName": model.label,
            "description": model.label, "inputTokenLimit": model.context_tokens,
            "outputTokenLimit": model.output_tokens, "thinking": model.max_budget > 0,
            "supportedGenerationMethods": ["generateContent", "countTokens"],
            "temperature": 1.0, "maxTemperature": 2.0, "topP": 0.95, "topK": 64}


# Relaying to the Gemini API

_SIGNED_PART = re.compile(r'"thought(?:Signature|_signature)"\s*:\s*"([^"\\]*)"')


def _stray_results(turns: Iterable[Turn]) -> bool:
    """Whether a result answers nothing of the turn before it, or something again."""
    waiting, last_role = set(), ""
    for turn in turns:
        if turn.role == "assistant":        # which may come in several contents
            waiting = (waiting if last_role == turn.role else set()) | {
                b.id for b in turn.blocks if isinstance(b, ToolCall)}
        last_role = turn.role
        for block in turn.blocks:
            if isinstance(block, ToolResult):
                if block.call_id not in waiting:
                    return True
                waiting.discard(block.call_id)
    return False


def _without_strays(contents: Any) -> list:
    """The contents without such results: the Gemini CLI tells each twice in a resumed session, and
    answers also the calls of an answer that was cut off."""
    out, waiting, last_role = [], [], ""        # (id or None, name) of calls
    for content in list_at(contents, "contents"):
        rows, parts = objects_of(content.get("parts")), []
        for part in rows:
            told = object_of(_told(part, "functionResponse"))
            given = told.get("id")
            call = next((c for c in waiting if given and c[0] == given), None) or next(
                (c for c in waiting if c[1] == told.get("name") and not (given and c[0])), None)
            if call or not told:
                parts.append(part)
            waiting = [c for c in waiting if c is not call]
        if content.get("role") == "model":
            calls = [object_of(_told(part, "functionCall")) for part in rows]
            waiting = (waiting if last_role == "model" else []) + [
                (call.get("id"), call.get("name")) for call in calls if call]
        last_role = content.get("role")
        out.append({**content, "parts": parts or [{"text": "."}]})
    return out


def _with_signatures(contents: Any) -> list | None:
    """The contents with a stand-in on each turn's first call that has no signature: another model
    made it; None where none is missing."""
    has_call, last_role, is_changed = False, "", False
    for content in objects_of(contents):
        role = content.get("role")
        has_call = has_call and role == last_role
        last_role = role
        for part in objects_of(content.get("parts")) if role == "model" else ():
            if _told(part, "functionCall") and not has_call:
                has_call = True
                if not _told(part, "thoughtSignature"):
                    part["thoughtSignature"], is_changed = SKIP_SIGNATURE, True     # [G5]
    return contents if is_changed else None


def gemini_relay_request(request: Request, target: Target,
                         repairs: frozenset = frozenset()) -> Rendered:
    """The client's own body; our envelopes in it are opened where they came from here, and stood in
    for elsewhere.  `repairs`: `signatures`, `pairs`, `drop <path>`."""
    text, mended = request.native.raw.decode("utf-8"), Mended()
    if "pairs" in repairs or _stray_results(request.turns):
        text = json_splice(text, {"contents": json_encode(_without_strays(
            json.loads(text)["contents"]))})
        mended["results without a call left out"] += 1

    def own(match: Any) -> str:
        signature = unwrap_signature(gemini_unwrap(match[1]))
        is_home = signature and (signature.family, signature.tag) == (
            _family(target.model), target.provider.signature_tag)
        if is_home and "signatures" not in repairs:
            return match[0].replace(match[1], signature.raw)
        if not signature and "signatures" not in repairs:
            return match[0]
        mended["lost signatures stood in for"] += 1
        return match[0].replace(match[1], SKIP_SIGNATURE)
    if "YWdwMS" in text or "signatures" in repairs:
        text = _SIGNED_PART.sub(own, text)
    if target.model.family == "gemini3" and any(
            isinstance(b, ToolCall) for t in request.turns for b in t.blocks):
        signed = _with_signatures(json.loads(text).get("contents"))
        if signed:
            text = json_splice(text, {"contents": json_encode(signed)})
            mended["lost signatures stood in for"] += 1
    changes: dict = {}
    if request.wanted != request.model:
        body = json.loads(text)
        name = "generation_config" if "generation_config" in body else "generationConfig"
        config, _ = _generation_config(request, target, True)
        changes[name] = json_encode({**object_of(body.get(name)), **{
            k: v for k, v in config.items() if k == "thinkingConfig"}})
    for path in [r[5:].split(".") for r in repairs if r.startswith("drop ")]:
        text, changes = json_splice(text, changes), {}
        rest = without(json.loads(text), path)
        changes[path[0]] = json_encode(rest[path[0]]) if path[0] in rest else None
    text = json_splice(text, changes) if changes else text
    return Rendered(text.encode("utf-8"), {}, AnswerShape(), mended)


class GeminiRelay(EventRelay):
    """Chunks of the Gemini API on their way to a Gemini client."""
    member = "modelVersion"

    def __init__(self, state: GeminiAnswer):
        self._plain, self._usages = GeminiPlain(), []   # usages of plain events, not read yet
        super().__init__(state)
        self._rest = self._named_rest = ""      # of plain events, as it comes and as it goes on

    def _read_usages(self) -> None:
        if self._usages:
            usages, self._usages = self._usages, []
            self._counts.update(self._plain.counts(usages))

    @property
    def counts(self) -> dict[str, int]:
        self._read_usages()
        return self._counts

    @counts.setter
    def counts(self, counts: dict[str, int]) -> None:
        self._counts = counts

    def _plain_data(self, data: str) -> str | None:
        """The data of a plain event as it goes on, unparsed: 4 us an event against 8."""
        row = self._plain(data)
        if row is None or data.startswith('{"response"'):
            return None
        rest = self._plain.rest
        if rest != self._rest:
            self._rest = self._named_rest = rest
            told = '{"":0' + rest               # an object again
            if json.loads(told).get(self.member) not in (None, self.state.model):
                self._named_rest = json_splice(told, {self.member: quote(self.state.model)})[5:]
        if row[2]:
            self._usages.append(row[2])
        if len(self._usages) > MAX_UNREAD_USAGES:
            self._read_usages()
        return data[:-len(rest)] + self._named_rest

    def feed(self, event: str) -> str:
        if self.has_content and event.startswith("data: {"):
            data = self._plain_data(event[6:])
            if data is not None:
                return self.state.frame(data)
        data = event_data(event) or (event if event.startswith("{") else "")
        if not data.startswith("{"):
            return ""
        value = json.loads(data)
        if value.get("error"):
            raise UpstreamFault(value)
        self._read(value)
        if value.get(self.member) not in (None, self.state.model):
            data = json_splice(data, {self.member: quote(self.state.model)})
        return self.state.frame(data.replace("\n", " "))

    def _read(self, value: dict) -> None:
        self.counts.update(gemini_parse_usage(object_of(value.get("usageMetadata"))))
        for candidate in objects_of(value.get("candidates")):
            self.has_finish |= bool(candidate.get("finishReason"))
            parts = object_of(candidate.get("content")).get("parts")
            self.has_content |= self.has_finish or bool(parts)
        if object_of(value.get("promptFeedback")).get("blockReason"):
            self.has_finish = self.has_content = True

    def read_whole(self, value: dict) -> None:
        if value.get("error") or not ({"candidates", "promptFeedback"} & value.keys()):
            raise UpstreamFault(value)
        self._read(value)

    def end(self) -> str:
        super().end()
        return self.state.last()


# Errors

class ErrorFacts(NamedTuple):
    """What an error body says: innermost message, ErrorInfo reasons and violated quota ids
    (upper-case), stated delay in seconds, link for the owner."""
    message: str
    reasons: frozenset
    delay_s: float | None
    link: str
    code: int


_IN_PROSE = re.compile(r"(?:reset(?:s)?\s+(?:after|in)|retry\s+(?:in|after)|quotaResetDelay\W+)\s*"
                       r"((?:\d+d)?\s*(?:\d+h)?\s*(?:\d+m(?!s))?\s*"
                       r"(?:\d+(?:\.\d+)?m?s(?:econds)?)?)"
                       r"(\d+(?=\s+seconds))?", re.I)
_LOGIN_LINK = re.compile(r"https://accounts\.google\.com/[^\s\"\\]+")


def _innermost(error: Any, depth: int = 3) -> tuple[str, dict, str]:
    """(message, error object, innermost type) after unwrapping JSON that stands as text in
    `message`, as the errors of Claude do behind Google."""
    if isinstance(error, list) and error:
        error = error[0]
    if not isinstance(error, dict):
        return str(error), {}, ""
    inner = error.get("error", error)
    if not isinstance(inner, dict):
        return str(inner), error, ""
    message = str(inner.get("message") or "")
    told = inner.get("detail") if not message else None      # FastAPI's servers
    if told:
        message = told if isinstance(told, str) else "; ".join(
            f"{'.'.join(map(str, row.get('loc') or ()))}: {row.get('msg')}"
            for row in objects_of(told)) or json_encode(told)
    if depth and message.lstrip().startswith(("{", "[")):
        with contextlib.suppress(ValueError, RecursionError):       # it only looked like JSON
            text, _, kind = _innermost(json.loads(message), depth - 1)
            return text, inner, kind
    return message, inner, str(inner.get("type") or "")


def _retry_headers_s(headers: Mapping[str, str], now: float) -> Iterator[float]:
    for name, scale in (("retry-after-ms", 0.001), ("retry-after", 1),
                        ("x-ratelimit-reset-after", 1)):
        value = headers.get(name, "")
        if re.fullmatch(r"\d+(\.\d+)?", value):
            yield float(value) * scale
        elif value and name == "retry-after":
            import email.utils
            with contextlib.suppress(TypeError, ValueError):    # neither seconds nor a date
                yield email.utils.parsedate_to_datetime(value).timestamp() - now
    if re.fullmatch(r"\d{9,}", headers.get("x-ratelimit-reset", "")):
        yield float(headers["x-ratelimit-reset"]) - now


def _link(details: list[dict], metadata: Mapping, message: str) -> str:
    if isinstance(metadata.get("validation_url"), str):
        return metadata["validation_url"]
    for detail in details:
        for link in objects_of(detail.get("links")):
            if "learn more" not in str(link.get("description", "")).lower():
                return str(link.get("url", ""))
    match = _LOGIN_LINK.search(message.replace("\\u0026", "&"))
    return match[0] if match else ""


def error_facts(raw: Any, headers: Mapping[str, str], now: float) -> ErrorFacts:
    """The facts of an error body (bytes, or an object from a stream).  A stated reset time wins;
    of several stated delays the longest counts."""
    if isinstance(raw, bytes):
        try:
            raw = json_decode(raw)
        except ValueError:
            text = re.sub(r"<[^>]*>|\s+", " ", raw[:400].decode("utf-8", "replace")).strip()
            raw = {"error": {"message": text}}
    message, error, kind = _innermost(raw)
    details = objects_of(error.get("details"))
    reasons, metadata = set(), {}
    delays = list(_retry_headers_s(headers, now))
    for detail in details:
        reasons.add(str(detail.get("reason", "")))
        if isinstance(detail.get("metadata"), dict):
            metadata.update(detail["metadata"])
        reasons.update(str(v.get("quotaId", "")) for v in objects_of(detail.get("violations")))
        delays.append(parse_duration_s(str(detail.get("retryDelay", ""))))
    reasons.update(str(e.get("reason", "")) for e in objects_of(error.get("errors")))
    delays.append(parse_duration_s(str(metadata.get("quotaResetDelay", ""))))
    said_at = re.search(r"reset(?:s)?(?: at)?\W+(\d{4}-\d\d-\d\d[T ][\d:]{8}Z?)", message)
    if said_at:
        delays.append((parse_timestamp(said_at[1].replace(" ", "T")) or now) - now)
    for name, origin in (("resets_in_seconds", 0.0), ("resets_at", now)):
        if isinstance(error.get(name), (int, float)):
            delays.append(error[name] - origin)
    for match in _IN_PROSE.finditer(message):
        delays.append(float(match[2]) if match[2]
                      else parse_duration_s(match[1].replace("econds", "")))
    stated = [d for d in delays if d is not None and 0 <= d <= MAX_STATED_DELAY_S]
    reset_at = parse_timestamp(str(metadata.get("quotaResetTimeStamp", "")))
    delay = max(stated, default=None)
    if reset_at is not None and 0 < reset_at - now <= MAX_STATED_DELAY_S:
        delay = reset_at - now
    code = error.get("code")
    if isinstance(code, str) or (isinstance(code, int) and code >= 1000):
        reasons.add(code if isinstance(code, str) and not code.isdigit() else f"CODE_{code}")
    reasons |= {str(error.get("type") or ""), str(error.get("status") or ""), kind}
    return ErrorFacts(message, frozenset(r.upper() for r in reasons if r), delay,
                      _link(details, metadata, message), code if isinstance(code, int) else 0)


# ── 12. Connections ───────────────────────────────────────────────────────
# Sockets to upstreams: opened by http.client (TCP, TLS, proxy tunnel), kept,
# reused, and closed.  Foreign exceptions become ProxyError here.  Knows no
# account and no dialect.


def readable(socks: list, timeout_s: float) -> list:
    """Those of `socks` with something to read (or an end), after at most `timeout_s`.  Bytes that
    TLS has already taken off the wire count."""
    ready = [s for s in socks if isinstance(s, ssl.SSLSocket) and s.pending()]
    if ready:
        return ready
    if hasattr(select, "poll"):         # select() cannot watch descriptors above 1,023
        poll = select.poll()
        by_number = {s.fileno(): s for s in socks}
        for number in by_number:
            poll.register(number, select.POLLIN)
        return [by_number[number] for number, _ in poll.poll(max(0.0, timeout_s) * 1000)]
    return select.select(socks, [], [], max(0.0, timeout_s))[0]


# Sockets on the path of a request never block: a timeout would cost an ioctl whenever it is set,
# and a poll before every send and recv.
NOT_YET = (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


def receive(sock: socket.socket, wait: Callable[[Any, float], None], timeout_s: float) -> bytes:
    """One recv.  A readable TLS socket may hold no data (session tickets, half a record): waited on
    again, within the same deadline."""
    deadline = time.monotonic() + timeout_s
    while True:
        wait(sock, max(0.0, deadline - time.monotonic()))
        try:
            return sock.recv(RECV_BYTES)
        except NOT_YET:
            continue


def writable(sock: socket.socket, timeout_s: float) -> bool:
    """Whether a socket takes bytes within `timeout_s`."""
    if hasattr(select, "poll"):
        poll = select.poll()
        poll.register(sock, select.POLLOUT)
        return bool(poll.poll(timeout_s * 1000))
    return bool(select.select([], [sock], [], timeout_s)[1])


def send_all(sock: socket.socket, data: bytes) -> None:
    """All of `data`; raises OSError, socket.timeout when nothing is taken for SEND_STALL_S."""
    left = memoryview(data)
    while left:
        try:
            left = left[sock.send(left):]
        except ssl.SSLWantReadError:
            readable([sock], SEND_STALL_S)
        except NOT_YET:
            if not writable(sock, SEND_STALL_S):
                raise socket.timeout("nothing is taken") from None


def network_error(err: BaseException, host: str) -> ProxyError:
    """What an OSError or http.client's exception means: one sentence, no URL, no secret."""
    if isinstance(err, (socket.timeout, TimeoutError)):
        return ProxyError("stall", f"{host} did not answer in time")
    text = err.strerror if isinstance(err, OSError) and err.strerror else type(err).__name__
    return ProxyError("network", f"{host} cannot be reached: {text}")


class Connection:
    """One upstream connection; `sock` never blocks."""

    def __init__(self, key: tuple, sock: socket.socket):
        self.key, self.sock = key, sock
        self.is_used = False        # has served a request: a failed write may be its age
        self.idle_since = 0.0

    @property
    def host(self) -> str:
        return self.key[1]

    def close(self) -> None:
        with contextlib.suppress(OSError):      # it may be gone already
            self.sock.close()


def _is_exempt(host: str, port: int | None, name: str) -> bool:
    """Whether an entry of $NO_PROXY names a host: itself, its domain, a network, or all."""
    import ipaddress
    if name == "*":
        return True
    if "/" in name:
        with contextlib.suppress(ValueError):       # a name, no address
            return ipaddress.ip_address(host) in ipaddress.ip_network(name, False)
        return False
    name, _, only = name.partition(":") if name.count(":") == 1 else (name.strip("[]"), "", "")
    name = name.lstrip("*").lstrip(".")
    return bool(name) and (not only or only == str(port)) and (
        host == name or host.endswith("." + name))


SOCKS_FAILURES = {1: "general failure", 2: "not allowed by its rules", 3: "network unreachable",
                  4: "host unreachable", 5: "connection refused", 6: "expired"}


def socks_connection(via: urllib.parse.SplitResult, host: str, port: int,
                     take: Callable[[int], bytes], send: Callable[[bytes], None]) -> None:
    """Asks a SOCKS5 proxy (RFC 1928, 1929), which looks up the name, for a connection to `host`."""
    user, word = (urllib.parse.unquote(t or "").encode()[:255]
                  for t in (via.username, via.password))
    send(b"\5\2\0\2" if user else b"\5\1\0")
    version, method = take(2)
    if version != 5 or method not in ((0, 2) if user else (0,)):
        raise ConnectionError(errno.EACCES, "the SOCKS proxy wants another sign-in")
    if method == 2:
        send(b"\1%c%b%c%b" % (len(user), user, len(word), word))
        if take(2)[1]:
            raise ConnectionError(errno.EACCES, "the SOCKS proxy refused its password")
    name = host.encode("idna") if ":" not in host else socket.inet_pton(socket.AF_INET6, host)
    kind = b"\4" if ":" in host else b"\3%c" % len(name)
    send(b"\5\1\0" + kind + name + port.to_bytes(2, "big"))
    _, failure, _, bound = take(4)
    if failure:
        raise ConnectionError(errno.EHOSTUNREACH, "the SOCKS proxy says: "
                              + SOCKS_FAILURES.get(failure, f"failure {failure}"))
    take({1: 4, 4: 16}.get(bound) or take(1)[0])
    take(2)


def http_tunnel(via: urllib.parse.SplitResult, host: str, port: int,
                take: Callable[[int], bytes], send: Callable[[bytes], None]) -> None:
    """Asks an HTTP proxy for a tunnel to `host` (RFC 9110, section 9.3.6)."""
    name = f"[{host}]" if ":" in host else host.encode("idna").decode("ascii")
    place = f"{name}:{port}"
    lines = [f"CONNECT {place} HTTP/1.1", f"Host: {place}"]
    if via.username:
        pair = (urllib.parse.unquote(t or "") for t in (via.username, via.password))
        token = base64.b64encode(":".join(pair).encode()).decode()
        lines.append("Proxy-Authorization: Basic " + token)
    send("\r\n".join([*lines, "", ""]).encode("ascii"))
    head = b""
    while not head.endswith(b"\r\n\r\n"):       # byte by byte: what follows is the tunnel's
        head += take(1)
        if len(head) > MAX_HEAD_BYTES:
            raise ConnectionError(errno.EPROTO, "its proxy sent an endless head")
    status = re.match(rb"HTTP/1\.\d (\d{3})", head)
    if not status or status[1][:1] != b"2":
        told = status[1].decode() if status else "no HTTP"
        raise ConnectionError(errno.EACCES, f"its proxy answered {told}")


def proxied(proxy: str, host: str, port: int, timeout_s: float) -> socket.socket:
    """A connection to `host` through a proxy, asked for within `timeout_s`.  Raises OSError."""
    via = urllib.parse.urlsplit(proxy if "//" in proxy else "http://" + proxy)
    ask, usual = {"socks5": (socks_connection, 1080), "socks5h": (socks_connection, 1080),
                  "http": (http_tunnel, 8080)}.get(via.scheme, (None, 0))
    if ask is None:
        raise OSError(errno.EPROTONOSUPPORT, f"a proxy by {via.scheme} is not supported")
    deadline = time.monotonic() + timeout_s
    sock = socket.create_connection((via.hostname, via.port or usual), timeout_s)

    def take(count: int) -> bytes:
        data = b""
        while len(data) < count:
            sock.settimeout(max(0.001, deadline - time.monotonic()))
            more = sock.recv(count - len(data))
            if not more:
                raise ConnectionError(errno.ECONNRESET, "its proxy hung up")
            data += more
        return data
    try:
        ask(via, host, port, take, sock.sendall)
        sock.settimeout(timeout_s)
    except BaseException:
        sock.close()
        raise
    return sock


@functools.lru_cache(maxsize=256)
def _place(base_url: str) -> tuple[str, str | None, int]:
    """(scheme, host, port) of a URL; raises ValueError."""
    url = urllib.parse.urlsplit(base_url)
    return url.scheme, url.hostname, url.port or (443 if url.scheme == "https" else 80)


class ConnectionCache:
    """Kept upstream connections by (scheme, host, port, proxy).  The lock guards `_idle` and
    `opened`, and is never held while a socket is used."""

    def __init__(self, clock: Clock, environ: Mapping[str, str],
                 settings: Callable[[], Mapping[str, Any]] = lambda: {}):
        self.clock, self.environ, self.settings = clock, environ, settings
        # read once: the environment is slow to look through, and each call asks
        self._proxies = {name.lower(): value for name, value in environ.items()
                         if name.lower().endswith("_proxy")}
        self.opened = 0
        self._lock = threading.Lock()
        self._idle: dict[tuple, list[Connection]] = {}
        self._tls: dict[str, ssl.SSLContext] = {}       # by the file of further authorities

    def take(self, base_url: str, timeout_s: float, proxy: str = "",
             fresh: bool = False) -> Connection:
        """A live connection to `base_url`; raises ProxyError network or stall."""
        try:
            place = _place(base_url)
        except ValueError as err:
            raise network_error(err, "the upstream") from err
        key = (*place, self._proxy_for(*place, proxy))
        while not fresh:
            with self._lock:
                kept = self._idle.get(key)
                connection = kept.pop() if kept else None
            if connection is None:
                break
            # readable while idle means closed, or out of step: neither can be used
            age_s = self.clock.monotonic() - connection.idle_since
            if age_s < UPSTREAM_IDLE_S and not readable([connection.sock], 0):
                return connection
            connection.close()
        try:
            return Connection(key, self._open(key, timeout_s))
        except (OSError, http.client.HTTPException, ValueError) as err:
            raise network_error(err, str(place[1])) from err

    def give(self, connection: Connection) -> None:
        """Keeps a connection whose last answer was read to its end, and no byte more."""
        connection.is_used, connection.idle_since = True, self.clock.monotonic()
        with self._lock:
            kept = self._idle.setdefault(connection.key, [])
            if len(kept) < UPSTREAM_IDLE_PER_HOST:
                kept.append(connection)
                return
        connection.close()

    def close(self) -> None:
        with self._lock:
            kept, self._idle = [c for row in self._idle.values() for c in row], {}
        for connection in kept:
            connection.close()

    def _proxy_for(self, scheme: str, host: str | None, port: int, own: str) -> str:
        """The proxy's URL, "" for none: the account's own, else that of the settings (`direct` is
        none), else $HTTPS_PROXY, $HTTP_PROXY or $ALL_PROXY for hosts that $NO_PROXY does not name
        and that are not this machine."""
        chosen = own or self.settings().get("proxy", "")
        if chosen:
            return "" if chosen == "direct" else chosen
        env = self._proxies
        if not env:
            return ""
        host, names = host or "", env.get("no_proxy", "").split(",")
        is_here = host == "localhost" or host == "::1" or host.startswith("127.")
        if is_here or any(_is_exempt(host, port, n.strip().lower()) for n in names):
            return ""
        return env.get(f"{scheme}_proxy", "") or env.get("all_proxy", "")

    def _tls_context(self) -> ssl.SSLContext:
        file = self.settings().get("ca_file", "")
        if file not in self._tls:
            context = ssl.create_default_context()
            try:
                if file:
                    context.load_verify_locations(os.path.expanduser(file))
            except OSError as err:
                raise OSError(err.errno, f"settings.ca_file cannot be used ({err.strerror})"
                              ) from err
            self._tls.setdefault(file, context)     # one for all who came at once
        return self._tls[file]

    def _open(self, key: tuple, timeout_s: float) -> socket.socket:
        scheme, host, port, proxy = key
        if scheme == "https":
            opener: http.client.HTTPConnection = http.client.HTTPSConnection(
                host, port, timeout=timeout_s, context=self._tls_context())
        else:
            opener = http.client.HTTPConnection(host, port, timeout=timeout_s)
        if proxy:       # where http.client would connect by itself; TLS comes after it
            opener._create_connection = lambda *_: proxied(proxy, host, port, timeout_s)
        opener.connect()            # sets TCP_NODELAY
        opener.sock.setblocking(False)
        with self._lock:
            self.opened += 1
        return opener.sock


def simple_call(connections: ConnectionCache, method: str, url: str, headers: Mapping[str, str],
                body: bytes | None = None,
                proxy: str = "",
                timeout_s: float = TOKEN_TIMEOUT_S) -> tuple[int, dict, bytes]:
    """(status, lower-case headers, body) of a small call: tokens, projects.  Raises ProxyError."""
    parts = urllib.parse.urlsplit(url)
    connection = connections.take(f"{parts.scheme}://{parts.netloc}", timeout_s, proxy, True)
    client = http.client.HTTPConnection("upstream")     # is connected already
    client.sock = connection.sock
    client.sock.settimeout(timeout_s)
    try:
        path = parts.path + ("?" + parts.query if parts.query else "")
        client.request(method, path or "/", body, {
            "Host": parts.netloc.rpartition("@")[2], **headers})
        response = client.getresponse()
        data = response.read(MAX_REPLY_BYTES)
        return response.status, {k.lower(): v for k, v in response.getheaders()}, data
    except (OSError, http.client.HTTPException, ValueError) as err:
        raise network_error(err, connection.host) from err
    finally:
        connection.close()


# ── 13. Accounts ──────────────────────────────────────────────────────────
# Who may speak upstream, and until when not.  One lock guards the pool;
# methods decide under it and return, nobody waits or writes holding it.
# Whether a candidate rests is derived from times and readings, never stored;
# `judge`, `score` and `choose` are pure, so a month is simulated in a second.


def hash_of_secret(secret: str) -> str:
    """Tells a credential from another one, where the secret itself must not stand."""
    return hashlib.sha256(secret.encode()).hexdigest()[:12]


@dataclass(eq=False)
class Account:
    """One credential with its state.  `lock` guards the token fields; the pool's lock the rest."""
    name: str
    provider: Provider                      # of its first pool
    credential: str                         # which of CREDENTIALS
    secret: str                             # unresolved: may be env:, file: or cmd:
    pools: tuple = ()                       # further Providers that the same sign-in may use
    project: str = ""                       # configured; what is found stands in its Facts
    enabled: bool = True
    priority: int = 0                       # lower first
    weight: float = 1.0
    models: tuple = ()                      # () serves all of its provider's
    tags: tuple = ()                        # words that groups choose accounts by
    max_in_flight: int = 0                  # 0 is no limit
    soft_limit: float | None = None         # None takes the setting
    proxy: str = ""
    headers: tuple = ()
    user_agent: str = ""
    in_flight: int = 0
    reserved: int = 0                       # places kept for requests that were woken
    ramp: int = 0                           # requests at a time after a switch, 0 is no limit
    used_at: float = 0.0                    # epoch seconds of its last lease
    served: float = 0.0                     # fair-queueing time: leases by weight
    health: float = HEALTH_START            # at `measured_at`
    tokens: float = BURST_TOKENS
    measured_at: float = 0.0
    lock: Any = field(default_factory=threading.Lock)
    access_token: str = ""
    token_expires_at: float = 0.0           # epoch seconds
    failure: tuple | None = None            # (monotonic time, ProxyError) of its last refresh
    spent: set = field(default_factory=set)     # refresh tokens that were rotated: never again
    _stops: tuple = (None, ())              # (secret, its stop_keys): one value, read as a whole

    @property
    def label(self) -> str:
        """What is shown: never an e-mail address."""
        return self.name.partition("@")[0]

    @property
    def providers(self) -> tuple:
        return (self.provider, *self.pools)

    @property
    def places(self) -> int:
        """Requests at a time, 0 is no limit."""
        most, ramp = self.max_in_flight, self.ramp
        return min(most, ramp) if most and ramp else most or ramp

    @property
    def is_full(self) -> bool:
        return 0 < self.places <= self.in_flight + self.reserved

    def soft_limit_of(self, settings: Mapping[str, Any]) -> float:
        return settings.get("soft_limit", 0.0) if self.soft_limit is None else self.soft_limit

    @property
    def stop_keys(self) -> tuple:
        """Keys of rests until a person acts: on the vendor's page, or by another credential."""
        secret, (secret_of, keys) = self.secret, self._stops
        if secret_of is not secret:     # hashed once: each judgement asks
            keys = ("stop", self.name), ("login", self.name, hash_of_secret(secret))
            self._stops = secret, keys
        return keys


# what a person may edit while the account goes on
ACCOUNT_CELLS = ("provider", "pools", "project", "enabled", "priority", "weight",
                 "models", "tags", "proxy", "max_in_flight", "soft_limit", "headers", "user_agent")


def account_from_row(row: Mapping, providers: Mapping[str, Provider]) -> Account:
    """An Account of a validated row of accounts.json."""
    credential = next((name for name in CREDENTIALS if row.get(name)), "")
    provider = providers[row["provider"]]
    given = {name: row[name] for name in ("project", "enabled", "priority", "max_in_flight",
                                          "soft_limit", "proxy", "user_agent") if name in row}
    return Account(
        row["name"], provider, credential, row.get(credential, ""),
        pools=tuple(providers[p] for p in provider.pools), weight=float(row.get("weight", 1)),
        models=tuple(row.get("models", ())), tags=tuple(map(str, row.get("tags", ()))),
        headers=tuple((str(k), str(v)) for k, v in row.get("headers", {}).items()), **given)


LOOK_AGAIN = "to be looked at again"    # in place of an absence that a person cleared


class Facts(NamedTuple):
    """What an upstream told about an account's pool."""
    project: str
    tier: str               # free, pro, ultra, or ""
    absent: str             # why the pool cannot be used, "" where it can
    models: tuple           # its catalogue as Model rows; () is unknown: all are tried
    at: float               # epoch seconds

    def is_absent(self, now: float) -> bool:
        return self.absent not in ("", LOOK_AGAIN) and abs(now - self.at) < ABSENT_LASTS_S


class Window(NamedTuple):
    """A reading of one quota.  `scope` is a model id, a quota group, or `account`."""
    scope: str
    window: str             # 5h, weekly, or the upstream's own word
    fraction: float | None  # left, 0 to 1; None is unknown, which is not zero
    reset_at: float         # epoch seconds, 0 where that is unknown
    at: float


def quota_group(model: Model, provider: Provider) -> str:
    """The group whose models may share one allowance, as Cloud Code counts."""
    if provider.envelope != "antigravity":
        return model.id
    return {"claude": "3p", "gpt-oss": "3p", "image": "gemini-image"}.get(model.family, "gemini")


@functools.lru_cache(maxsize=256)
def host_key(url: str) -> tuple:
    """Under what a host rests, for all endpoints that it has."""
    return "host", "/".join(url.split("/", 3)[:3])


class Candidate:
    """An account's pool that serves a model.  What decisions look up by is prepared here."""
    __slots__ = ("account", "provider", "model", "upstream_id", "rank", "pair", "key", "keys",
                 "hosts", "scopes", "watched", "variant")

    def __init__(self, account: Account, provider: Provider, model: Model, served: str,
                 place: int = 0):
        self.account, self.provider = account, provider
        self.model, self.upstream_id = model, served
        self.variant = ""           # a group's name for it that says how to think
        # lower first: what was asked for comes before what stands in for it, and the first pool of
        # all accounts before the second of any
        self.rank = account.priority, place, [p.id for p in account.providers].index(provider.id)
        self.pair = name, pool = account.name, provider.id
        self.key, group = ("candidate", name, pool, model.id), quota_group(model, provider)
        # everything whose rest makes this one rest; hosts count when all of them rest
        self.keys = (("account", name), ("pair", name, pool), self.key,
                     ("group", name, pool, group), ("capacity", pool, model.id), ("pool", pool))
        self.hosts = tuple(map(host_key, provider.base_urls))
        self.watched = self.keys + self.hosts       # without a row there it does not rest
        self.scopes = tuple(dict.fromkeys((served, model.id, group, "account")))

    @property
    def place_key(self) -> tuple:
        """The same for what would be the same call."""
        return (*self.pair, self.upstream_id)


class Plan(NamedTuple):
    """Who may serve a request: the models its name means, and candidates by rank."""
    models: tuple
    candidates: list
    is_group: bool = False      # several names in their order: another one may take what one cannot


def plain_model_name(name: str) -> str:
    """Without vendor prefix and `[1m]`-like endings."""
    name = re.sub(r"(?i)\A(?:models|google|anthropic|antigravity)/", "", name.strip())
    return WINDOW_MARK.sub("", name)


def normal_model_name(name: str) -> str:
    """The plain name in lower case, a Claude's without date."""
    name = plain_model_name(name).lower().replace("@", "-")
    return re.sub(r"-(?:\d{8}|latest)\Z", "", name) if name.startswith("claude") else name


def alias_targets(name: str, wanted: str, aliases: Mapping[str, tuple]) -> tuple:
    """What the owner's alias for a name says, () where there is none.  A name is looked up as it is
    spelled, plain, and without a date; then without an ending about thinking."""
    for spelled in (name, wanted) if aliases else ():
        for form in (WINDOW_MARK.sub("", spelled).lower(), plain_model_name(spelled).lower(),
                     normal_model_name(spelled)):
            patterns = [p for p in aliases if fnmatch.fnmatchcase(form, p)]
            if patterns:
                return aliases[max(patterns, key=len)]
    return ()


def virtual_model(name: str, wanted: str, config: Config) -> Group | None:
    """The group that a name is, or an alias that stands for more than one plain model."""
    for spelled in (name, wanted) if config.groups else ():
        plain = WINDOW_MARK.sub("", spelled).lower()
        # lists have it as `claude-…` too, for clients that keep no others
        bare = plain[7:] if plain.startswith("claude-") else plain
        group = config.groups.get(plain) or config.groups.get(bare)
        if group is not None:
            return group
    targets = alias_targets(name, wanted, config.aliases)
    is_plain = len(targets) == 1 and targets[0].lower() not in config.groups and not re.search(
        r"[/(]", targets[0])
    return Group("priority", tuple(map(GroupItem, targets))) if targets and not is_plain else None


def _is_named(name: str, provider: Provider, is_stand_in: bool = True) -> bool:
    """Whether the provider takes a name (lower-case) as it is."""
    patterns = provider.names + (provider.stand_ins if is_stand_in else ())
    return any(fnmatch.fnmatchcase(name, p) for p in patterns)


def upstream_id(model: Model, provider: Provider) -> str:
    """The id `provider` knows the model by, "" where it does not serve it."""
    if provider.catalogue == "as asked":
        if not _is_named(model.id.lower(), provider):
            return ""           # others' `-thinking` is part of their names
        return model.id.replace("-thinking", "") if model.family == "claude" else model.id
    if provider.catalogue in ("key_id", "vertex"):
        return model.key_id
    if provider.catalogue == "cli_id":
        return GEMINI_CLI_IDS.get(model.key_id, "")
    return model.id if model.on_cloud_code else ""


def account_serves(account: Account, model: Model, provider: Provider,
                   facts: Facts | None) -> str:
    """The upstream id of `model` in this pool of the account, "" when it does not serve it."""
    if account.models and model.id not in account.models:
        return ""
    served = upstream_id(model, provider)
    listed = {m.id for m in facts.models} if facts else ()
    is_set = model.id in account.models and provider is account.provider
    if provider.catalogue == "as asked":        # its list leaves aliases out
        return model.id if is_set or model.id in listed else served
    if is_set:                                  # whatever the list knows
        return served or model.id
    if not served and provider is account.provider and model.id in listed:
        served = model.id
    return served if not listed or served in listed else ""


def model_from_id(name: str, label: str = "", **limits: int) -> Model:
    """A row for an id that the catalogue here lacks: careful limits where none are given."""
    family = next((f for word, f in (("claude", "claude"), ("gpt", "gpt-oss"), ("image", "image"),
                                     ("gemini-2", "gemini25")) if word in name), "gemini3")
    return Model(name, label or name, family, limits.get("context") or 200000,
                 limits.get("output") or 32000, limits.get("least") or 1024, 30976,
                 limits.get("budget") or (16000 if family == "claude" else -1), False, "")


def _model_choices(name: str, wanted: str, aliases: Mapping[str, tuple],
                   listed: Iterable[str]) -> tuple:
    """The ids a client's name may mean, in order of preference, and whether an alias of the owner
    says so; () for a name nobody knows.  `wanted` is the name without an ending about thinking."""
    targets, wanted = alias_targets(name, wanted, aliases), normal_model_name(wanted)
    if targets:
        return tuple(map(plain_model_name, targets)), True
    if wanted in MODELS:
        return (wanted, *filter(None, (HEIRS.get(wanted),))), False
    choices = [(m,) for m in listed if m.lower() == wanted]
    choices += [c for p, c in ALIASES.items() if fnmatch.fnmatchcase(wanted, p)]
    if wanted.startswith("claude") or wanted in TIERS:
        choices += [c for word, c in TIERS.items() if word in wanted] + [TIERS["sonnet"]]
    return next(iter(choices), ()), False


def _as_listed(full: str, wanted: str, is_row: Callable[[str], bool]) -> str:
    """The name that counts: the full one where it is a row's (what looks like an ending is part of
    it then), without the `claude-` that other models are listed with for clients that keep no
    other ids; else the `wanted` part."""
    for spelled in (full, wanted):
        bare = spelled[7:]
        if spelled.lower().startswith("claude-") and not is_row(spelled) and (is_row(bare) or any(
                fnmatch.fnmatchcase(bare.lower(), p) for p in ALIASES)):
            return bare
    return full if is_row(full) else wanted


def resolve_models(name: str, accounts: list[Account], aliases: Mapping[str, tuple],
                   serves: Callable[[Model], Any], models: list[Model], wanted: str) -> tuple:
    """The models a client's name means, in order of preference: the very one where a provider takes
    names as they are asked for, and that of alias, catalogue, known names or Claude tier.  Of
    several that fit, the first that `serves` says somebody has.  Raises ProxyError not_found."""
    listed = {m.id: m for m in models}
    own = {m.lower(): m for m in (*listed, *(m for a in accounts for m in a.models))}

    def is_row(name: str) -> bool:
        return name.lower() in MODELS or name.lower() in own

    def known(choice: str) -> Model | None:
        lower = choice.lower()
        spelled = own.get(lower, lower if lower.startswith("claude-") else choice)
        is_taken = lower in own or any(_is_named(lower, a.provider) for a in accounts)
        return MODELS.get(lower) or listed.get(spelled) or (
            model_from_id(spelled) if is_taken else None)
    wanted = _as_listed(plain_model_name(name), plain_model_name(wanted or name), is_row)
    choices, is_alias = _model_choices(name, wanted, aliases, listed)
    exact = None if is_alias else known(wanted)
    rows = [m for m in map(known, choices) if m is not None]
    asked = normal_model_name(wanted)
    if not is_alias and not is_row(wanted) and (asked.startswith("claude") or asked in TIERS):
        # what clients ask for by default, where accounts serve nothing but models of their own
        rows += [m for m in map(known, own.values()) if m is not None]
    found = next(filter(serves, rows), rows[0] if rows else None)
    if exact is not None and (found is None or serves(exact)):
        # the same family may stand in where other accounts serve it under another name
        stands_in = found and found.family == exact.family == "claude" and (
            found.id != exact.id and serves(found))
        return (exact, found) if stands_in else (exact,)
    if found is not None:
        return (found,)
    sought = choices[0] if is_alias else wanted
    near = difflib.get_close_matches(normal_model_name(sought), list(MODELS), 3, 0.0)
    told = f"{name} is an alias of {sought}, which" if is_alias else name
    raise ProxyError("not_found", f"model: {told} is not known; nearest are {', '.join(near)}")


def fallback_for(model: Model) -> str:
    """The id of the model's pair, "" where it has none."""
    return next((to for pattern, to in FALLBACKS.items()
                 if fnmatch.fnmatchcase(model.id, pattern)), "")


# Rests

@dataclass
class Rest:
    """Why and until when something is not asked.  Stated times are facts, guesses preferences."""
    kind: str
    until: float            # epoch seconds; infinite until a person acts
    is_stated: bool
    failures: int
    failed_at: float
    message: str
    changed_at: float = 0.0     # the newer of two processes' versions holds
    seen_empty: bool = False    # a quota reading agreed with it: a later one may lift it

    @property
    def is_stated_quota(self) -> bool:
        return self.is_stated and self.kind == "quota"

    def holds(self, now: float) -> bool:
        """Whether it is in force.  One that would last noticeably longer than it was made for (the
        clock was set back), or than any limit does, is void."""
        return now < self.until <= now + 1.2 * MAX_STATED_DELAY_S and (
            self.failed_at - now <= max(60.0, 0.2 * (self.until - self.failed_at)))


class Verdict(NamedTuple):
    """One candidate at one moment: a line of the score sheet."""
    candidate: Candidate
    state: str              # usable, soft, tried, stopped, busy, stated, guessed
    until: float            # epoch seconds, 0 where that says nothing
    reason: str             # for people
    terms: tuple = ()       # ((name, points), ...) of the hybrid score

    @property
    def score(self) -> float:
        return sum(points for _, points in self.terms)


class Choice(NamedTuple):
    lease: Any              # a Lease, or None
    wait_s: float | None    # until the soonest release, None when waiting does not help
    verdicts: tuple
    reason: str             # why this one: the x-agproxy-route header


class View(NamedTuple):
    """What a decision looks at: the pool's tables and the settings, at one moment."""
    rests: Mapping[tuple, Rest] = {}
    facts: Mapping[tuple, Facts] = {}           # (account, pool)
    quotas: Mapping[tuple, Mapping] = {}        # (account, pool) -> {scope: {window: Window}}
    settings: Mapping[str, Any] = {}


@dataclass(eq=False)
class Ask:
    """One request before the pool: whose it is, and how it is woken when a place is kept for it."""
    session: str = ""           # of its conversation
    agent: str = ""             # of a session's agents, served in turn
    wake: Callable[[], None] = lambda: None
    arrived_at: float = 0.0     # in the queue, monotonic
    place: Any = None           # the Account that keeps a place for it


def is_stated(error: ProxyError) -> bool:
    """Whether the upstream itself said until when this candidate is limited."""
    return error.delay_s is not None and error.kind in ("quota", "rate")


def fresh_windows(candidate: Candidate, view: View, now: float) -> list[Window]:
    """Readings that tell something about the candidate now: not too old, not past their reset."""
    readings = view.quotas.get(candidate.pair)
    if not readings:
        return []
    oldest = now - max(QUOTA_STALE_S, 2 * view.settings.get("quota_poll_s", 0))
    return [w for scope in candidate.scopes for w in readings.get(scope, {}).values()
            if w.fraction is not None and oldest < w.at <= now + 60
            and (w.reset_at > now or not w.reset_at)]


def measured(account: Account, now: float) -> tuple[float, float]:
    """(health, burst tokens) at `now`: both grow back with time."""
    hours = max(0.0, now - account.measured_at) / 3600 if account.measured_at else 0.0
    return (min(100.0, account.health + hours * HEALTH_STEPS["hour"]),
            min(float(BURST_TOKENS), account.tokens + hours * 60 * BURST_PER_MINUTE))


def score(candidate: Candidate, view: View, least: float | None, now: float) -> tuple:
    """The terms of the hybrid score, () for other strategies; `least` is the smallest fraction
    left, None where no reading tells.  What does not qualify (health, allowance or quota too low)
    is taken last, by a term of its own."""
    settings, account = view.settings, candidate.account
    if settings.get("strategy") != "hybrid":
        return ()
    health, tokens = measured(account, now)
    idle_s = min(3600.0, max(0.0, now - account.used_at)) if account.used_at else 3600.0
    is_fresh = now - account.used_at > FIVE_HOURS_S
    is_last = health < HEALTH_LEAST or tokens < 1 or (
        least is not None and least <= QUOTA_CRITICAL)
    return (("fresh", settings["hybrid_fresh"] * is_fresh),
            ("health", settings["hybrid_health"] * health),
            ("tokens", settings["hybrid_tokens"] * tokens / BURST_TOKENS * 100),
            ("quota", settings["hybrid_quota"] * (50.0 if least is None else least * 100)),
            ("idle", settings["hybrid_idle"] * idle_s), ("last choice", -1e6 * is_last))


def _stopped(candidate: Candidate, view: View, now: float) -> str:
    """Why nothing may be sent before a person acts, or while the pool is absent; else ""."""
    account, rests = candidate.account, view.rests
    if not account.enabled:
        return "disabled; `accounts enable` brings it back"
    for key in account.stop_keys if rests else ():
        if key in rests and rests[key].until > now:
            return rests[key].message
    facts = view.facts.get(candidate.pair)
    return facts.absent if facts and facts.is_absent(now) else ""


def _resting(candidate: Candidate, rests: Mapping[tuple, Rest], now: float) -> list[Rest]:
    """The rests in force; hosts count when all of them rest."""
    if not rests or rests.keys().isdisjoint(candidate.watched):
        return []       # as mostly: one look for all keys
    resting = [rests[key] for key in candidate.keys if key in rests and rests[key].holds(now)]
    hosts = [rests[key] for key in candidate.hosts if key in rests and rests[key].holds(now)]
    if hosts and len(hosts) == len(candidate.hosts):
        resting.append(min(hosts, key=lambda r: r.until))
    return sorted(resting, key=lambda r: r.until)


def judge(candidate: Candidate, view: View, tried: Iterable, now: float) -> Verdict:
    """Pure: whether this candidate may be asked now, and if not, why and until when."""
    account, stop = candidate.account, _stopped(candidate, view, now)
    if stop:
        return Verdict(candidate, "stopped", 0, stop)
    resting = _resting(candidate, view.rests, now)
    if resting:
        stated = [r for r in resting if r.is_stated]
        if stated:
            return Verdict(candidate, "stated", stated[-1].until, stated[-1].message)
    windows = fresh_windows(candidate, view, now)
    spent = [w for w in windows if w.fraction <= 0 and w.reset_at] if windows else ()
    if spent:
        last = max(spent, key=lambda w: w.reset_at)
        return Verdict(candidate, "stated", last.reset_at,
                       f"no quota is left in its {last.window} window ({last.scope})")
    until, reason = (resting[-1].until, resting[-1].message) if resting else (0, "was tried")
    if candidate in tried:
        return Verdict(candidate, "tried", until, reason)
    if account.is_full:
        return Verdict(candidate, "busy", now + 5, f"serves {account.in_flight} requests already")
    if resting:
        return Verdict(candidate, "guessed", until, reason)
    least = min([w.fraction for w in windows]) if windows else None
    terms = score(candidate, view, least, now)
    soft = account.soft_limit_of(view.settings)
    least = 1.0 if least is None else least
    if soft and least <= soft:
        return Verdict(candidate, "soft", 0, f"{least:.0%} of its quota is left, "
                       f"the soft limit is {soft:.0%}", terms)
    return Verdict(candidate, "usable", 0, "", terms)


# Strategies

def _not_last(verdict: Verdict, last: str, virtual: float) -> bool:
    """The account that served last, until it is limited; then the next in order."""
    return verdict.candidate.account.name != last


def _had_least(verdict: Verdict, last: str, virtual: float) -> float:
    """Start-time fair queueing: who had least by its weight; a long absence earns no burst."""
    return max(virtual, verdict.candidate.account.served)


STRATEGIES = {      # the first line of the sheet with the least key is chosen
    "sticky": _not_last, "fill-first": _not_last, "hybrid": lambda verdict, *_: -verdict.score,
    "round-robin": _had_least, "weighted": _had_least}


def choose(sheet: tuple, strategy: str, last: str, bound: Iterable, probing: Iterable,
           virtual: float) -> tuple[Verdict | None, str]:
    """Pure: (the line of the sheet to act on or None, why).  `last` served this model last, `bound`
    are the conversation's (account, pool) pairs, the best first, `virtual` fair-queueing time."""
    usable = [v for v in sheet if v.state == "usable"] or [v for v in sheet if v.state == "soft"]
    if usable:
        told = f"{len(usable)} of {len(sheet)} usable"
        rank = min([v.candidate.rank for v in usable])
        if bound:       # a warm cache does not outweigh an account of lower priority
            warm = {v.candidate.pair: v for v in usable if v.candidate.rank[0] == rank[0]}
            for pair in bound:
                if pair in warm:
                    return warm[pair], f"{strategy}; its conversation's account; {told}"
        if len(usable) > 1:
            first = [v for v in usable if v.candidate.rank == rank]
            usable = [min(first, key=lambda v: STRATEGIES[strategy](v, last, virtual))]
        return usable[0], f"{strategy}; {told}"
    guessed = [v for v in sheet if v.state == "guessed"]
    is_tested = any(v.candidate.key in probing for v in guessed)
    if guessed and not is_tested and not any(v.state == "busy" for v in sheet):
        # one request tests, the others wait for its result, as they wait for one that is busy
        return min(guessed, key=lambda v: v.until), "shortest guessed rest; none usable"
    return None, ""


def sheet_rows(verdicts: Iterable[Verdict], now: float) -> list[dict]:
    """The score sheet as JSON: for `why`, `explain` and the database."""
    return [{"account": v.candidate.account.label, "pool": v.candidate.provider.id,
             "model": v.candidate.model.id, "state": v.state, "reason": v.reason,
             **({"free_in_s": round(v.until - now, 1)} if v.until > now else {}),
             **({"score": round(v.score, 1),
                 "terms": {name: round(points, 1) for name, points in v.terms}} if v.terms else {})}
            for v in verdicts]


class Lease:
    """An account lent to one attempt, settled exactly once.  As a context manager it settles itself
    (with nothing to blame) unless it was settled or passed on with its open stream."""

    is_probe = False            # it tests a guessed rest
    is_settled = is_passed_on = False

    def __init__(self, settle: Callable[[Lease, Any, bool], None], candidate: Candidate,
                 reason: str, began_at: float):
        self._settle, self.candidate, self.reason = settle, candidate, reason
        self.began_at = began_at        # epoch seconds

    def settle(self, error: ProxyError | None = None, is_success: bool = False) -> None:
        if not self.is_settled:
            self.is_settled = True
            self._settle(self, error, is_success)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if not self.is_passed_on:
            self.settle()


def burn_rate(points: Iterable[tuple], reset_at: float,
              now: float) -> tuple[str, float | None, float | None]:
    """(burning, stable, recovering, exhausted or calculating; fraction per hour; seconds to empty)
    by least squares over the points since the last reset, of a day at most."""
    points = [p for p in points if now - p[0] <= min(86400, max(3600, reset_at - now))]
    for i in range(len(points) - 1, 0, -1):
        if points[i][1] - points[i - 1][1] > 0.3:       # a reset: what was before says nothing
            points = points[i:]
            break
    if points and points[-1][1] <= 0:
        return "exhausted", 0.0, 0.0
    if len(points) < 2 or points[-1][0] - points[0][0] < 60:
        return "calculating", None, None
    mean_t = sum(t for t, _ in points) / len(points)
    mean_f = sum(f for _, f in points) / len(points)
    spread = sum((t - mean_t) ** 2 for t, _ in points)
    per_h = 3600 * sum((t - mean_t) * (f - mean_f) for t, f in points) / spread
    per_h = max(-1.0, min(1.0, per_h))
    if abs(per_h) < 0.002:
        return "stable", per_h, None
    return ("recovering", per_h, None) if per_h > 0 else (
        "burning", per_h, points[-1][1] / -per_h * 3600)


_OWN_RESTS = ("account", "pair", "candidate", "group")


class Rests:
    """Why and until when accounts, models, hosts and pools are not asked.  The pool's lock guards
    it.  Changes go to `state` at once, and those of other processes come back from there; one that
    ended stays as a row of the past, so that an older version of it is known as such."""

    def __init__(self, clock: Clock, state: State | None):
        self.clock, self.state = clock, state
        self.items: dict[tuple, Rest] = {}

    def set(self, key: tuple, rest: Rest) -> None:
        # newer than what it replaces, even when the clock was set back
        rest.changed_at = max(self.clock.now(), self.items[key].changed_at + 0.001
                              if key in self.items else 0.0)
        self.items[key] = rest
        self.keep(key, rest)

    def keep(self, key: tuple, rest: Rest) -> None:
        # what is missing in this process's environment is its own affair
        if self.state is not None and rest.kind != "no_secret":
            self.state.put("rests", json_encode(key), rest.kind, rest.until, rest.is_stated,
                           rest.failures, rest.failed_at, redact(rest.message), rest.changed_at,
                           urgent=True)

    def end(self, key: tuple) -> None:
        if key in self.items and self.items[key].until:
            self.set(key, Rest(self.items[key].kind, 0.0, False, 0, 0.0, ""))

    def note(self, key: tuple, error: ProxyError, now: float) -> None:
        """Writes down a rest.  Failures within 2 s are one burst; an hour forgets the count."""
        old = self.items.get(key)
        failures = 1
        if old and old.kind == error.kind and now - old.failed_at < 3600:
            failures = old.failures + (now - old.failed_at > 2)
        ladder, stated = GUESSED_REST_S[error.rule.rest], is_stated(error)
        rest_s = ladder[min(failures, len(ladder)) - 1]
        if stated:
            rest_s = max(1.0, error.delay_s) + 1.0      # grace: clocks differ
        elif error.rule.rest == "capacity":
            rest_s = jitter(rest_s, 0.1)        # so that waiting requests do not return at once
        if old and old.is_stated and old.until > now + rest_s * stated:
            return          # a stated limit is not shortened, and not by a guess at all
        self.set(key, Rest(error.kind, now + rest_s, stated, failures, now, error.message))

    def widen(self, candidate: Candidate) -> None:
        """Two models of a quota group limited until the same moment share one allowance."""
        one, group = self.items.get(candidate.key), candidate.keys[3]
        if not one or not one.is_stated_quota:
            return
        for key, rest in list(self.items.items()):
            if (key[:3] == candidate.key[:3] and key != candidate.key and rest.is_stated_quota
                    and abs(rest.until - one.until) < 3 and key[3] in MODELS
                    and quota_group(MODELS[key[3]], candidate.provider) == group[3]):
                self.set(group, replace(one))

    def succeeded(self, candidate: Candidate, began_at: float, now: float) -> None:
        """Ends guesses older than the success, and what is over; what was stated stays."""
        for key in candidate.keys if self.items else ():
            rest = self.items.get(key)
            if rest and rest.until and (rest.until <= now or (not rest.is_stated
                                                              and rest.failed_at <= began_at)):
                self.end(key)

    def stands(self, key: tuple, now: float) -> bool:
        return key in self.items and self.items[key].until > now

    def of(self, account: str, now: float) -> list[tuple[tuple, Rest]]:
        """Those in force that are about this account alone, stops left out."""
        return [(key, rest) for key, rest in self.items.items()
                if key[0] in _OWN_RESTS and key[1] == account and rest.holds(now)]

    def take(self, rows: Iterable[tuple]) -> set[str]:
        """Takes over what is newer on disk; accounts whose stop or stated limit was ended there."""
        cleared = set()
        for text, kind, until, stated, *row in rows:
            with contextlib.suppress(ValueError, TypeError):    # not of our making
                key, new = tuple(json_decode(text.encode())), Rest(kind, until, bool(stated), *row)
                old = self.items.setdefault(key, new)
                if old.changed_at >= new.changed_at:
                    continue
                if old.is_stated and old.holds(self.clock.now()) and not until:
                    cleared.add(key[1])
                self.items[key] = new
        return cleared


class Readings:
    """What upstreams told of accounts' pools: facts, quota windows.  The pool's lock guards it."""

    def __init__(self, clock: Clock, state: State | None):
        self.state = state
        self.facts: dict[tuple, Facts] = {}                 # (account, pool)
        self.quotas: dict[tuple, dict] = {}                 # ... -> {scope: {window: Window}}
        self.points: dict[tuple, collections.deque] = {}    # (account, pool, scope, window)
        for account, pool, *row in state.rows("quotas", "at > ? ORDER BY at",
                                              clock.now() - 86400) if state else ():
            self._take(account, pool, Window(*row))

    def take_facts(self, rows: Iterable[tuple]) -> bool:
        """Takes over what is newer on disk; whether anything was."""
        is_news = False
        for account, pool, *told, models, at in rows:
            known = self.facts.get((account, pool))
            if known is None or known.at < at:
                with contextlib.suppress(ValueError, TypeError):    # another version's catalogue
                    listed = tuple(Model(*row) for row in json_decode(models.encode()))
                    self.facts[account, pool] = Facts(*told, listed, at)
                    is_news = True
        return is_news

    def take_windows(self, rows: Iterable[tuple]) -> None:
        """The same for readings."""
        for account, pool, *row in rows:
            window = Window(*row)
            known = self.quotas.get((account, pool), {}).get(window.scope, {}).get(window.window)
            if known is None or known.at < window.at:
                self._take(account, pool, window)

    def note_facts(self, pair: tuple, facts: Facts) -> None:
        self.facts[pair] = facts
        if self.state is not None:
            self.state.put("facts", *pair, facts.project, facts.tier, facts.absent,
                           json_encode([list(m) for m in facts.models]), facts.at, urgent=True)

    def note_windows(self, pair: tuple, windows: Iterable[Window]) -> None:
        for window in windows:
            if self._take(*pair, window) and self.state is not None:
                self.state.put("quotas", *pair, *window)

    def windows(self, pair: tuple) -> list[Window]:
        return [w for row in self.quotas.get(pair, {}).values() for w in row.values()]

    def left(self, pair: tuple, scopes: Iterable[str], since: float) -> float | None:
        """The least fraction that readings after `since` show for these scopes."""
        return min((w.fraction for w in self.windows(pair) if w.scope in scopes
                    and w.fraction is not None and w.at > since), default=None)

    def report(self, pair: tuple, stale_s: float, now: float) -> list[dict]:
        """The windows of a pool as JSON, with how fast each goes."""
        rows = []
        for window in sorted(self.windows(pair)):
            points = self.points.get((*pair, window.scope, window.window), ())
            trend, per_h, empty_s = burn_rate(points, window.reset_at, now)
            is_over = 0 < window.reset_at <= now
            rows.append({
                "pool": pair[1], "scope": window.scope, "window": window.window,
                "fraction": None if is_over else window.fraction, "reset_at": window.reset_at,
                "read_at": window.at, "is_stale": is_over or now - window.at > stale_s,
                "trend": trend, "per_hour": per_h, "empty_in_s": empty_s})
        return rows

    def _take(self, account: str, pool: str, window: Window) -> bool:
        """Whether the reading is worth a row: a change, or ten minutes gone by."""
        readings = self.quotas.setdefault((account, pool), {})
        readings.setdefault(window.scope, {})[window.window] = window
        if window.fraction is None:
            return False
        points = self.points.setdefault((account, pool, window.scope, window.window),
                                        collections.deque(maxlen=QUOTA_POINTS))
        if points and points[-1][1] == window.fraction and window.at - points[-1][0] < 600:
            return False
        points.append((window.at, window.fraction))
        return True


class Bindings:
    """Where conversations' prompt caches are warm; the pool's lock guards it.  Who serves one is
    its home; who serves while that rests is a guest, the home once the home's cache is cold."""

    def __init__(self):
        # (session, model) -> ((account, pool), when it served last) of home and perhaps guest
        self._items: collections.OrderedDict = collections.OrderedDict()

    def of(self, session: str, model: str, now: float, keep_s: float) -> list[tuple[tuple, float]]:
        """Home and guest, each with the time it served last, while they are remembered."""
        return [(pair, at) for pair, at in self._items.get((session, model), ())
                if now - at < keep_s]

    def bind(self, session: str, model: str, pair: tuple, now: float, keep_s: float) -> None:
        old = self._items.pop((session, model), None)
        is_home = old is None or old[0][0] == pair or now - old[0][1] >= keep_s
        self._items[session, model] = ((pair, now),) if is_home else (old[0], (pair, now))
        if len(self._items) > 5000:
            self._items.popitem(last=False)


class Queue:
    """Requests that wait for a place at a busy account.  A place that comes free is kept for one of
    them, which is woken, so that no newcomer takes it.  The pool's lock guards it."""

    def __init__(self):
        self.waiting: dict[Ask, tuple] = {}                         # -> accounts that may serve it
        self._turns: collections.Counter = collections.Counter()    # places kept, by agent

    def add(self, ask: Ask, accounts: tuple, now: float) -> None:
        if accounts:
            ask.arrived_at = ask.arrived_at or now
            self.waiting[ask] = accounts

    def drop(self, ask: Ask) -> Account | None:
        """The account that kept a place for it, as free again as before."""
        self.waiting.pop(ask, None)
        account, ask.place = ask.place, None
        if account is not None:
            account.reserved -= 1
        return account

    def hand_over(self, account: Account | None) -> None:
        """Keeps the account's free places for who waits: who can go nowhere else first, then agents
        in turn, first come first.  None is no account, and nothing to hand over."""
        if account is None:
            return
        while self.waiting:
            waiting = [a for a, accounts in self.waiting.items() if account in accounts]
            if not waiting or account.is_full:
                return
            ask = min(waiting, key=lambda a: (len(self.waiting[a]) > 1, self._turns[a.agent],
                                              a.arrived_at))
            ask.place = account
            account.reserved += 1
            del self.waiting[ask]
            self._turns[ask.agent] += 1
            ask.wake()
        self._turns.clear()


STOPPED_STATES = {"validation": "needs verification", "disabled": "banned",
                  "revoked": "needs login", "auth_expired": "needs login"}


def account_report(account: Account, rests: Rests, readings: Readings,
                   settings: Mapping[str, Any], now: float) -> dict:
    """One account as JSON: its state in words, pools, quota windows and limits."""
    limits = [{"scope": " ".join(key[2:]) or "account", "kind": rest.kind, "until": rest.until,
               "is_stated": rest.is_stated, "message": rest.message}
              for key, rest in rests.of(account.name, now)]
    stop = next((rests.items[k] for k in account.stop_keys if rests.stands(k, now)), None)
    pools, quotas, tier = [], [], ""
    stale_s = max(QUOTA_STALE_S, 2 * settings.get("quota_poll_s", 0))
    for provider in account.providers:
        pair = account.name, provider.id
        facts = readings.facts.get(pair) or Facts("", "", "", (), 0)
        tier = tier or facts.tier
        pools.append({"pool": provider.id, "absent": facts.absent, "read_at": facts.at,
                      "project": account.project or facts.project})
        quotas += readings.report(pair, stale_s, now)
    soft = account.soft_limit_of(settings)
    known = [q["fraction"] for q in quotas if q["fraction"] is not None and not q["is_stale"]]
    state = ("disabled" if not account.enabled else
             STOPPED_STATES.get(stop.kind, "stopped") if stop else
             "absent" if all(p["absent"] not in ("", LOOK_AGAIN) for p in pools) else
             "limited" if 0 in known or any(r["is_stated"] for r in limits) else
             "needs a secret" if any(r["kind"] == "no_secret" for r in limits) else
             "resting" if limits else
             "soft-limited" if soft and any(f <= soft for f in known) else "ready")
    return {"name": account.label, "provider": account.provider.id, "tier": tier,
            "state": state, "reason": stop.message if stop else "",
            "priority": account.priority, "in_flight": account.in_flight,
            "last_used_at": account.used_at, "health": round(measured(account, now)[0]),
            "pools": pools, "quotas": quotas, "limits": limits}


class AccountPool:
    """Lends accounts.  The lock guards everything here and the pool's fields of each Account;
    what changes is put to `state`, which writes in its own thread."""

    def __init__(self, accounts: Iterable[Account], clock: Clock, settings: Mapping[str, Any],
                 state: State | None = None):
        self.clock, self.settings, self.state = clock, settings, state
        self.accounts: list[Account] = []
        self.in_flight = 0
        self.rests, self.readings = Rests(clock, state), Readings(clock, state)
        self._lock = threading.Lock()
        self._last: dict[str, str] = {}                     # model id -> account name
        self.bindings, self.queue = Bindings(), Queue()
        self._probing: set[tuple] = set()                   # keys of candidates under test
        self._virtual = 0.0
        self._turns: dict[tuple, int] = {}                  # (group, conversation) -> first member
        # candidates by model ids, and models by names: as long as accounts and facts stay
        self._prepared: dict[tuple, Any] = {}
        # account -> (last use, health, burst tokens), as it was last stored
        self._used = {row[0]: row[1:] for row in state.rows("used")} if state else {}
        self._looked_at = 0.0           # for what others wrote; of the state's thread
        if state is not None:
            self.take_over()
            state.on_foreign_change, state.on_lost = self.take_over, self.put_again
        self.replace(accounts, settings)

    def replace(self, accounts: Iterable[Account], settings: Mapping[str, Any]) -> None:
        """Takes over an edited accounts file; leases of accounts that are gone run out."""
        with self._lock:
            known = {a.name: a for a in self.accounts}
            out = [self._go_on(known.get(account.name), account) for account in accounts]
            if settings.get("pid_offset") and out:
                offset = os.getpid() % len(out)
                out = out[offset:] + out[:offset]
            self.accounts = sorted(out, key=lambda a: a.priority)
            self.settings, self._prepared = settings, {}

    def _go_on(self, old: Account | None, edited: Account) -> Account:
        """The account as edited, with its state if provider and kind of credential are the same."""
        if old is None or (old.provider.id, old.credential) != (edited.provider.id,
                                                                edited.credential):
            if edited.name in self._used:
                edited.used_at, edited.health, edited.tokens = self._used[edited.name]
                edited.measured_at = edited.used_at
            return edited
        is_other = edited.provider != old.provider      # perhaps with the client that was missing
        if is_other:
            self.rests.end(old.stop_keys[1])
        with old.lock:      # a rotation under way must not be undone by the file as it was before
            old.failure = None if is_other else old.failure
            if edited.secret != old.secret and edited.secret not in old.spent:
                # rotated by another process, or a new sign-in
                old.secret, old.access_token, old.failure = edited.secret, "", None
        for name in ACCOUNT_CELLS:
            setattr(old, name, getattr(edited, name))
        return old

    # Choosing

    def candidates(self, *models: Model) -> list[Candidate]:
        """Who serves the models, each pool with the first that it serves, by rank."""
        key = tuple(model.id for model in models)
        with self._lock:
            if key not in self._prepared:
                found = [self._candidate(account, provider, models)
                         for account in self.accounts for provider in account.providers]
                self._prepared[key] = sorted(filter(None, found), key=lambda c: c.rank)
            return self._prepared[key]

    def _candidate(self, account: Account, provider: Provider, models: tuple) -> Candidate | None:
        facts = self.readings.facts.get((account.name, provider.id))
        for place, model in enumerate(models):
            served = account_serves(account, model, provider, facts)
            if served:
                is_stand_in = bool(provider.stand_ins) and model.id not in account.models and (
                    not _is_named(model.id.lower(), provider, False))
                return Candidate(account, provider, model, served,
                                 place + len(models) * is_stand_in)
        return None

    def models_for(self, name: str, aliases: Mapping[str, tuple], wanted: str = "") -> tuple:
        """The models a client's name means here; raises ProxyError not_found."""
        return self._once((name, wanted, frozenset(aliases.items())), lambda: resolve_models(
            name, self.accounts, aliases, self.candidates, self.listed_models(), wanted))

    def plan(self, name: str, wanted: str, config: Config, seed: str | None = None,
             depth: int = 0) -> Plan:
        """Who serves what a name means; `seed` tells a conversation, whose random orders stay; with
        None nobody's turn is used up.  Raises ProxyError not_found."""
        wanted = wanted or split_variant(name)[0]
        is_plain = not (config.groups or config.aliases or "/" in wanted)
        if is_plain:        # mostly the name was found before: 1.1 us against 4.2
            with self._lock:
                known = self._prepared.get((None, name, wanted))
            if known is not None:
                return known
        group = virtual_model(name, wanted, config)
        if group is not None and depth < 8:     # groups and aliases may lead in a circle
            return self._plan_group(name, group, config, seed, depth)
        try:
            if "/" in wanted and not alias_targets(name, wanted, config.aliases):
                provider, exact = self._slashed(WINDOW_MARK.sub("", wanted).strip())
                if exact is not None:
                    return Plan((exact,), self.candidates(exact))
                if provider:
                    return self._plan_at(wanted.partition("/")[2], provider)
            if is_plain:        # None is no model's id: other keys are tuples of those
                return self._once((None, name, wanted),
                                  lambda: self._plan_plain(name, wanted, {}))
            return self._plan_plain(name, wanted, config.aliases)
        except ProxyError:
            if config.unknown_model == "default" and config.default_model and not depth:
                return self.plan(config.default_model, "", config, seed, depth + 1)
            if config.unknown_model != "pass" or self._slashed(wanted)[0]:
                raise
            return self._plan_at(wanted, "*")

    def _plan_plain(self, name: str, wanted: str, aliases: Mapping[str, tuple]) -> Plan:
        models = self.models_for(name, aliases, wanted)
        return Plan(models, self.candidates(*models))

    def _slashed(self, name: str) -> tuple[str, Model | None]:
        """(the provider that a name begins with, or "", the model that it is as a whole, or None).
        An account of that provider comes first where its list or its owner knows the rest, then
        who lists the whole name, then any account of that provider, then who takes such names."""
        return self._once(("slashed", name), lambda: self._split_name(name))

    def _once(self, key: tuple, find: Callable[[], Any]) -> Any:
        """What `find` answers, kept as long as accounts and facts stay."""
        with self._lock:
            found, prepared = self._prepared.get(key), self._prepared
        if found is None:
            found = find()
            with self._lock:        # what was learned meanwhile has begun another table
                prepared[key] = found
                if len(prepared) > 1000:        # clients make up names
                    prepared.clear()
        return found

    def _split_name(self, name: str) -> tuple[str, Model | None]:
        lower, (head, _, rest) = name.lower(), name.lower().partition("/")
        accounts = [(a, p) for a in self.accounts for p in a.providers]
        at_head = [a for a, p in accounts if p.id == head and rest]
        known = {m.lower() for a in at_head for m in a.models}
        for account in at_head:
            facts = self.facts((account.name, head))
            known |= {m.id.lower() for m in facts.models} if facts else set()
        listed = next((m for m in self.listed_models() if m.id.lower() == lower), None)
        if at_head and (rest in known or listed is None):
            return head, None
        # `anthropic/claude-x` that a list lacks is a plain name with its vendor before it
        is_plain = plain_model_name(name) != name
        is_taken = any(_is_named(lower, p) and not (is_plain and self.facts((a.name, p.id)))
                       for a, p in accounts)
        return "", listed or (model_from_id(name) if is_taken else None)

    def _plan_at(self, name: str, provider: str) -> Plan:
        """A name at one provider (`*`: any): who takes names as they are asked for gets it."""
        name = WINDOW_MARK.sub("", name).strip()
        return self._once(("at", provider, name), lambda: self._find_at(name, provider))

    def _find_at(self, name: str, provider: str) -> Plan:
        asked = [a for a in self.accounts if a.provider.catalogue == "as asked"
                 and provider in (a.provider.id, "*") and (not a.models or name in a.models)]
        if asked:
            model = MODELS.get(name.lower()) or next(
                (m for m in self.listed_models() if m.id.lower() == name.lower()),
                model_from_id(name))
            return Plan((model,), sorted((Candidate(a, a.provider, model, model.id)
                                          for a in asked), key=lambda c: c.rank))
        models = self.models_for(name, {}, name)
        return Plan(models, [c for c in self.candidates(*models)
                             if provider in (c.provider.id, "*")])

    def _plan_group(self, name: str, group: Group, config: Config, seed: str | None,
                    depth: int) -> Plan:
        models: list[Model] = []
        found: dict[tuple, Candidate] = {}      # each once, however many members mean it
        missing = ProxyError("not_found", f"model: nobody serves {name}")
        is_alias = config.groups.get(WINDOW_MARK.sub("", name).lower()) is not group
        plain = replace(config, aliases={}) if is_alias else config     # whose targets are plain
        for place, item in enumerate(self._members(name, group, config, seed)):
            wanted = split_variant(item.model)[0]
            try:
                plan = (self._plan_at(wanted, item.provider) if item.provider
                        else self.plan(item.model, wanted, plain, seed, depth + 1))
            except ProxyError as err:
                missing = err
                continue
            models += plan.models
            for candidate in plan.candidates:
                account = candidate.account
                if candidate.place_key not in found and item.account in (
                        "", account.name, account.label) and (
                        not item.tag or item.tag in account.tags):
                    mine = found[candidate.place_key] = copy.copy(candidate)
                    mine.rank = (place, *candidate.rank)
                    mine.variant = candidate.variant or item.model * (wanted != item.model)
        if not models:
            raise missing
        return Plan(tuple(models), list(found.values()), True)

    def _members(self, name: str, group: Group, config: Config,
                 seed: str | None) -> list[GroupItem]:
        """The group's items in the order of its strategy, groups in it in their place."""
        items = list(group.items)
        if group.strategy in ("random", "weighted"):
            is_weighted = group.strategy == "weighted"
            items = ordered(items, f"{name} {seed}", lambda i: i.weight if is_weighted else 1.0)
        elif group.strategy == "round-robin":
            turn = self._turn(name, seed) % len(items)
            items = items[turn:] + items[:turn]
        out: list[GroupItem] = []
        for item in items:
            inner = config.groups.get(item.model.lower())
            if inner is not None and item.model.lower() != name.lower():
                out += [i._replace(**{cell: getattr(i, cell) or getattr(item, cell)
                                      for cell in ("account", "tag", "provider")})
                        for i in self._members(item.model, inner, config, seed)]
            else:
                out.append(item)
        return out

    def _turn(self, name: str, seed: str | None) -> int:
        """Whose turn it is in a group: the next one's; for a conversation whose it was at first,
        which spares caches and signatures.  Who only looks (None) takes none."""
        with self._lock:
            if seed and (name, seed) in self._turns:
                return self._turns[name, seed]
            turn = self._turns.get((name, ""), -1) + 1
            if seed is None:
                return turn
            self._turns[name, ""] = turn
            if len(self._turns) > 2000:
                self._turns = {key: at for key, at in self._turns.items() if not key[1]}
            if seed:
                self._turns[name, seed] = turn
            return turn

    def listed_models(self) -> list[Model]:
        """Models that accounts or their upstreams' lists name and this file does not."""
        with self._lock:
            told = [m for facts in self.readings.facts.values() for m in facts.models]
            told += [model_from_id(m) for account in self.accounts for m in account.models]
            return list({m.id: m for m in reversed(told) if m.id not in MODELS}.values())

    def offers(self) -> list[tuple[Model, list[Candidate]]]:
        """What is served by name; who takes any name is asked for none of the catalogue."""
        hidden = self.settings.get("hidden_models", ())
        with self._lock:
            told = {pair: {m.id for m in facts.models} & MODELS.keys()
                    for pair, facts in self.readings.facts.items()}
        rows = [(model, [c for c in self.candidates(model) if c.account.models
                         or "*" not in c.provider.names or model.id not in MODELS
                         or model.id in told.get(c.pair, ())])
                for model in (*MODELS.values(), *self.listed_models())
                if not any(fnmatch.fnmatchcase(model.id.lower(), h.lower()) for h in hidden)]
        return [(model, candidates) for model, candidates in rows if candidates]

    def view(self) -> View:
        return View(self.rests.items, self.readings.facts, self.readings.quotas, self.settings)

    def lease(self, candidates: Iterable[Candidate], tried: Iterable,
              ask: Ask | None = None) -> Choice:
        """Lends the best candidate, or says how long to wait and why none can be had.  One that
        waits for a busy account keeps its place in the queue until `leave`."""
        now, ask = self.clock.now(), ask or Ask()
        with self._lock:
            # a place kept for it is as free as any now; who never waited has none
            kept = self.queue.drop(ask) if ask.arrived_at else None
            view = self.view()
            sheet = tuple([judge(c, view, tried, now) for c in candidates])
            chosen, reason = self._choose(sheet, ask, now)
            home = None
            if chosen is not None and len(sheet) > 1:
                home = self._busy_home(sheet, ask, now)
            if home is not None:        # a warm cache is worth a moment
                chosen, sheet = None, tuple(
                    v for v in sheet if v is home or v.state not in ("usable", "soft", "busy"))
            is_full = self.in_flight >= self.settings.get("max_upstream_calls", 1 << 30)
            lease = None
            if chosen is None:
                self.queue.add(ask, tuple(v.candidate.account for v in sheet if v.state == "busy"),
                               self.clock.monotonic())
            elif not is_full:
                lease = self._lend(chosen, sheet, ask, reason, now)
            self.queue.hand_over(kept)
        if lease is not None:
            return Choice(lease, None, sheet, reason)
        if chosen is not None:
            raise ProxyError("full", "too many upstream calls are in flight", 1)
        if home is not None:
            left_s = ask.arrived_at + HOME_WAIT_S - self.clock.monotonic()
            return Choice(None, max(0.05, left_s), sheet, "waits for its conversation's account")
        soon = [max(0.05, v.until - now) for v in sheet if v.state in ("stated", "busy")]
        soon += [0.25] * any(v.state == "guessed" for v in sheet)
        return Choice(None, min(soon, default=None), sheet, "")

    def borrow(self, candidate: Candidate) -> Lease:
        """This very candidate, whatever the others are: for the upkeep's own requests."""
        now = self.clock.now()
        with self._lock:
            return self._lend(Verdict(candidate, "usable", 0, ""), (), Ask(), "auto-refresh", now)

    def leave(self, ask: Ask) -> None:
        """The request is over: it waits no longer, and gives back a place kept for it."""
        if ask.arrived_at:          # set by its own thread; else it was never in the queue
            with self._lock:
                self.queue.hand_over(self.queue.drop(ask))

    def explain(self, candidates: Iterable[Candidate]) -> tuple[Verdict | None, str, tuple]:
        """A dry run: (what would be chosen, why, the score sheet)."""
        sheet = self.verdicts(candidates, ())
        with self._lock:
            return (*self._choose(sheet, Ask(), self.clock.now()), sheet)

    def outlook(self, candidate: Candidate) -> tuple[Verdict, Window | None]:
        """One line of the sheet, and the reading that binds it."""
        now = self.clock.now()
        with self._lock:
            windows = fresh_windows(candidate, self.view(), now)
            return (judge(candidate, self.view(), (), now),
                    min(windows, key=lambda w: w.fraction, default=None))

    def verdicts(self, candidates: Iterable[Candidate], tried: Iterable) -> tuple:
        now = self.clock.now()
        with self._lock:
            view = self.view()
            return tuple(judge(c, view, tried, now) for c in candidates)

    def _choose(self, sheet: tuple, ask: Ask, now: float) -> tuple[Verdict | None, str]:
        model = sheet[0].candidate.model.id if sheet else ""
        bound = [pair for pair, _ in self._bound(ask, model, now)]
        return choose(sheet, self.settings.get("strategy", "sticky"), self._last.get(model, ""),
                      bound, self._probing, self._virtual)

    def _bound(self, ask: Ask, model: str, now: float) -> list[tuple[tuple, float]]:
        if self.settings.get("strategy") == "round-robin":
            return []
        return self.bindings.of(ask.session, model, now, self.settings.get("affinity_s", 3600))

    def _busy_home(self, sheet: tuple, ask: Ask, now: float) -> Verdict | None:
        """The line of the conversation's home, while it is only busy and worth waiting for."""
        for pair, at in self._bound(ask, sheet[0].candidate.model.id, now)[:1]:
            home = next((v for v in sheet if v.candidate.pair == pair), None)
            waits_s = self.clock.monotonic() - (ask.arrived_at or self.clock.monotonic())
            if home and home.state == "busy" and now - at < HOME_WARM_S and waits_s < HOME_WAIT_S:
                return home
        return None

    def _lend(self, chosen: Verdict, sheet: tuple, ask: Ask, reason: str, now: float) -> Lease:
        account = chosen.candidate.account
        model = (sheet or (chosen,))[0].candidate.model.id      # what was asked for
        lease = Lease(self.settle, chosen.candidate, reason, now)
        account.in_flight += 1
        self.in_flight += 1
        account.health, tokens = measured(account, now)
        account.tokens, account.measured_at = max(0.0, tokens - 1), now
        previous, self._last[model] = self._last.get(model), account.name
        if previous != account.name and now - account.used_at > 60:
            left = {v.state for v in sheet if v.candidate.account.name == previous}
            if left and left.isdisjoint(("usable", "soft", "busy")):
                account.ramp = RAMP_START   # the storm that spent the last one does not spend it
        account.used_at = now
        weight = account.weight if self.settings.get("strategy") == "weighted" else 1.0
        self._virtual = max(self._virtual, account.served)
        account.served = self._virtual + 1 / max(weight, 1e-3)
        if chosen.state == "guessed":
            lease.is_probe = True
            self._probing.add(chosen.candidate.key)
        if ask.session:
            self.bindings.bind(ask.session, model, chosen.candidate.pair, now,
                               self.settings.get("affinity_s", 3600))
        self._keep_used(account, now, 10)
        return lease

    def _keep_used(self, account: Account, now: float, every_s: float = 0) -> None:
        if self.state is not None and now - self._used.get(account.name, (-1e9,))[0] >= every_s:
            self._used[account.name] = account.used_at, account.health, account.tokens
            self.state.put("used", account.name, *self._used[account.name])

    # Settling

    def settle(self, lease: Lease, error: ProxyError | None, is_success: bool) -> None:
        """Gives a lease back; an error counts against what its rule names."""
        candidate, now = lease.candidate, self.clock.now()
        with self._lock:
            candidate.account.in_flight -= 1
            self.in_flight -= 1
            if lease.is_probe:
                self._probing.discard(candidate.key)
            if is_success:
                self.rests.succeeded(candidate, lease.began_at, now)
                self._feel(candidate.account, "success", now)
            elif error is not None:
                self._punish(candidate, error, now)
            self.queue.hand_over(candidate.account)

    def proved(self, lease: Lease) -> None:
        """The candidate answers with content: guesses about it are over, others may come."""
        account = lease.candidate.account
        with self._lock:
            if lease.is_probe:
                lease.is_probe = False
                self._probing.discard(lease.candidate.key)
            self.rests.succeeded(lease.candidate, lease.began_at, self.clock.now())
            if account.ramp:
                account.ramp = account.ramp * 2 if account.ramp < RAMP_END else 0
                self.queue.hand_over(account)

    def _feel(self, account: Account, step: str, now: float) -> None:
        account.health, account.tokens = measured(account, now)
        account.measured_at = now
        account.health = max(0.0, min(100.0, account.health + HEALTH_STEPS[step]))
        if step != "success":
            self._keep_used(account, now)

    def _punish(self, candidate: Candidate, error: ProxyError, now: float) -> None:
        rule = error.rule
        account, pair, one, _, capacity, pool = candidate.keys
        if rule.scope in (Scope.ACCOUNT, Scope.CANDIDATE, Scope.PAIR):
            self._feel(candidate.account, "limit" if rule.status == 429 else "failure", now)
        if rule.rest == "stop":
            self._stop(candidate.account, error)
            return
        key = {Scope.ACCOUNT: account, Scope.PAIR: pair, Scope.CANDIDATE: one,
               Scope.CAPACITY: capacity, Scope.POOL: pool}.get(rule.scope)
        if key:
            self.rests.note(key, error, now)
            self.rests.widen(candidate)

    def _stop(self, account: Account, error: ProxyError) -> None:
        needs_page = error.kind in ("validation", "disabled")
        self.rests.set(account.stop_keys[0 if needs_page else 1], Rest(
            error.kind, float("inf"), True, 1, self.clock.now(), error.message))

    def stop(self, account: Account, error: ProxyError) -> None:
        """Sends nothing more for this account until a person acts."""
        with self._lock:
            self._stop(account, error)

    def rest_host(self, url: str, error: ProxyError) -> None:
        with self._lock:
            self.rests.note(host_key(url), error, self.clock.now())

    def host_answered(self, url: str) -> None:
        if self.rests.items and host_key(url) in self.rests.items:      # mostly not: no lock is
            with self._lock:                                            # taken for nothing
                self.rests.end(host_key(url))

    def hosts(self, provider: Provider) -> list[str]:
        """The provider's base URLs, those that rest last."""
        rests = self.rests.items
        if not rests or len(provider.base_urls) == 1:       # no lock is taken for nothing
            return list(provider.base_urls)
        now = self.clock.now()
        with self._lock:
            return sorted(provider.base_urls, key=lambda url: (
                host_key(url) in rests and rests[host_key(url)].holds(now)))

    # What a person clears, what other processes and upstreams tell

    def clear(self, account: Account, stops_only: bool = False) -> int:
        """Ends the account's stop, and every other rest and absence of it; how many."""
        with self._lock:
            now = self.clock.now()
            keys, absent = [k for k in account.stop_keys if self.rests.stands(k, now)], []
            if not stops_only:      # an absence is looked at again
                keys += [key for key, _ in self.rests.of(account.name, now)]
                absent = [(pair, facts) for pair, facts in self.readings.facts.items()
                          if pair[0] == account.name and facts.absent]
            for key in keys:
                self.rests.end(key)
            for pair, facts in absent:
                self.readings.note_facts(pair, facts._replace(absent=LOOK_AGAIN, at=now))
            self._recover({account.name})
            return len(keys) + len(absent)

    def take_over(self) -> None:
        """What other processes learned.  Called by the state's thread; reads without the lock."""
        rests, facts = self.state.rows("rests"), self.state.rows("facts")
        # a reading is written a moment after it was made
        since, self._looked_at = self._looked_at - 60, self.clock.now()
        windows = self.state.rows("quotas", "at > ? ORDER BY at", since) if since > 0 else ()
        used = {name: at for name, at, *_ in self.state.rows("used")}
        with self._lock:
            self._recover(self.rests.take(rests))
            self.readings.take_windows(windows)
            for account in self.accounts:
                account.used_at = max(account.used_at, used.get(account.name, 0.0))
            # with many processes somebody writes each second: what was prepared mostly stays
            if self.readings.take_facts(facts):
                self._prepared = {}

    def _recover(self, names: Iterable[str]) -> None:
        """Accounts that a person cleared are as good as new ones."""
        for account in self.accounts:
            if account.name in names and account.health < HEALTH_START:
                account.health, account.measured_at = HEALTH_START, self.clock.now()
                self._keep_used(account, account.measured_at)

    def put_again(self) -> None:
        """Everything that is remembered, for a state that lost it.  Called by its thread."""
        with self._lock:
            for key, rest in self.rests.items.items():
                self.rests.keep(key, rest)
            for pair, facts in self.readings.facts.items():
                self.readings.note_facts(pair, facts)
            for pair in self.readings.quotas:
                for window in self.readings.windows(pair):
                    self.state.put("quotas", *pair, *window)

    def facts(self, pair: tuple) -> Facts | None:
        with self._lock:
            return self.readings.facts.get(pair)

    def note_facts(self, pair: tuple, facts: Facts) -> None:
        with self._lock:
            self.readings.note_facts(pair, facts)
            self._prepared = {}

    def note_windows(self, pair: tuple, windows: Iterable[Window]) -> None:
        """Takes over readings.  A stated limit that readings agreed with is lifted by one that
        shows quota again; a reading that never agreed proves nothing against a 429."""
        now, ids = self.clock.now(), {p.id: p for a in self.accounts for p in a.providers}
        with self._lock:
            self.readings.note_windows(pair, windows)
            for key, rest in self.rests.of(pair[0], now):
                if not rest.is_stated_quota or key[0] not in ("candidate", "group") or (
                        key[2] != pair[1]):
                    continue
                scopes, model, provider = {key[3], "account"}, MODELS.get(key[3]), ids.get(pair[1])
                if model and provider:
                    scopes |= {quota_group(model, provider), upstream_id(model, provider)}
                left = self.readings.left(pair, scopes, rest.failed_at)
                if left is not None and left <= 0:
                    rest.seen_empty = True
                elif left is not None and rest.seen_empty:
                    self.rests.end(key)

    # Reports

    def is_stopped(self, account: Account) -> bool:
        """Whether nothing may be sent for it until a person acts."""
        now = self.clock.now()
        return not account.enabled or any(self.rests.stands(k, now) for k in account.stop_keys)

    def has_stated_limit(self, pair: tuple) -> bool:
        with self._lock:
            return any(rest.is_stated and key[2:3] == pair[1:]
                       for key, rest in self.rests.of(pair[0], self.clock.now()))

    def history(self) -> list[dict]:
        """Every remembered reading, the points of a window as (epoch seconds, fraction left)."""
        with self._lock:
            return [{"account": key[0].partition("@")[0], "pool": key[1], "scope": key[2],
                     "window": key[3], "points": list(points)}
                    for key, points in self.readings.points.items()]

    def states(self) -> list[tuple[Account, str]]:
        """Each account with its state in words."""
        return [(account, row["state"]) for account, row in self.reports()]

    def report(self) -> list[dict]:
        """Each account as JSON: its state, pools, quota windows with burn rates, and limits."""
        return [row for _, row in self.reports()]

    def reports(self) -> list[tuple[Account, dict]]:
        """The same beside the accounts, which an edit may replace at any moment."""
        now = self.clock.now()
        with self._lock:
            return [(a, account_report(a, self.rests, self.readings, self.settings, now))
                    for a in self.accounts]


def explain(verdicts: Iterable[Verdict], now: float) -> str:
    """Each candidate, why it was passed over, and when it is free."""
    verdicts = list(verdicts)
    is_mixed = len({v.candidate.model.id for v in verdicts}) > 1

    def line(v: Verdict) -> str:
        until = f", free in {human_s(v.until - now)}" if now < v.until < float("inf") else ""
        model = f", {v.candidate.model.id}" if is_mixed else ""
        return (f"{v.candidate.account.label} ({v.candidate.provider.id}{model}): "
                f"{(v.reason or v.state).rstrip('.')}{until}")
    return "; ".join(map(line, verdicts))


def refusal(asked: str, verdicts: tuple, now: float, last: ProxyError | None) -> ProxyError:
    """The answer when no candidate is left: what failed, for each candidate why, one command."""
    told = explain(verdicts, now)
    tip = "run `python3 agproxy.py accounts list` to see them all"
    if not verdicts:
        return ProxyError("no_account", f"no account serves {asked}; run `python3 agproxy.py "
                          "models` to see which account serves what")
    if all(v.state == "stopped" for v in verdicts):
        return ProxyError("no_account",
                          f"no account can serve {asked} until a person acts: {told}; {tip}")
    if last is not None and not all(v.state in ("stated", "stopped") for v in verdicts):
        # the last failure says best what happened; a guessed rest is not worth waiting for
        rest = min((v.until - now for v in verdicts if v.until > now), default=None)
        wait_s = rest if last.rule.status in (429, 529) else None
        more = f" ({told})" if len(verdicts) > 1 else ""
        return ProxyError(last.kind, last.message + more, last.retry_after_s or wait_s)
    soonest = min((v.until for v in verdicts if v.until > now), default=now + 1)
    at = time.strftime("%H:%M" if soonest - now < 43200 else "%d %b %H:%M", time.localtime(soonest))
    return ProxyError("exhausted", f"all accounts for {asked} are exhausted until {at} "
                      f"({human_s(soonest - now)}): {told}; {tip}", soonest - now)


# ── 14. OAuth ─────────────────────────────────────────────────────────────
# Sign-ins and the small calls around them: access tokens, the projects and
# quotas behind an account, the browser flow, credentials of other programs,
# and the keeper that does all this ahead of need.  Knows no dialect.
#
# The sign-in of an installed program (RFC 6749, 7636 and 8252):
#   GET  auth_url      client_id redirect_uri scope state code_challenge ...  -> the vendor's page
#   GET  redirect_uri  state code, or state error                             -> our listener
#   POST token_url     code redirect_uri code_verifier -> access_token expires_in refresh_token
#   POST token_url     refresh_token                   -> access_token expires_in [refresh_token]
# [O1] The exchange must name the very redirect_uri of the first step, port included.
# [O2] A refresh token works only with the client that issued it.
# [O3] Without prompt=consent a second sign-in brings no refresh token.
# [O4] A refresh may answer a new refresh token; the old one is spent from then on.
# Cloud Code's small calls are proto3 JSON over POST /v1internal:<method>:
# [O5] Zeros are omitted: a reset time without a fraction means that nothing is left.
# [O6] Each host counts its own quota: the one that serves generation is asked.
# [O7] An account that was never used reports a reset one window ahead: no limit.


def _client_variable(provider: Provider) -> str:
    return f"AGPROXY_{provider.id.upper().replace('-', '_')}_CLIENT"


def oauth_clients(provider: Provider, environ: Mapping[str, str]) -> list[tuple[str, str]]:
    """(client id, secret) pairs that may have issued this provider's refresh tokens, the likeliest
    first: environment, accounts file, the list other programs read.  This program ships none."""
    found = [(environ.get(name + "_ID", ""), environ.get(name + "_SECRET", ""))
             for name in (_client_variable(provider), "GOOGLE_CLIENT")]
    own_id, own_secret = provider.client_id, provider.client_secret
    if own_id:
        found.append((resolve_secret(own_id) if ":" in own_id else own_id,
                      resolve_secret(own_secret) if own_secret else ""))
    for entry in environ.get("ANTIGRAVITY_OAUTH_CLIENTS", "").split(";"):
        parts = [p.strip() for p in entry.split("|")]
        found.append((parts[1], parts[2]) if len(parts) > 2 else ("", ""))
    for _, secret in found:
        remember_secret(secret)
    return [pair for pair in dict.fromkeys(found) if all(pair)]


def no_client(provider: Provider) -> ProxyError:
    variable = _client_variable(provider)
    return ProxyError("no_secret", f"no OAuth client is known for {provider.id}: install its own "
                      f"program and sign in with `accounts add`, or set {variable}_ID and the same "
                      "with _SECRET (GOOGLE_CLIENT_ID and GOOGLE_CLIENT_SECRET work too), or "
                      f"client_id and client_secret in providers.{provider.id}")


_AGAIN = "; sign in again with `accounts add`"
GRANT_ERRORS = {        # the token endpoint's words -> a sentence with what to do
    "invalid_grant": "the sign-in was revoked or has expired" + _AGAIN,
    "clock_skew": "this machine's clock is wrong by minutes; set it, then `accounts verify`",
    "unauthorized_client": "the refresh token belongs to another OAuth client; set the client that "
                           "issued it (README, Accounts), or sign in with this one: `accounts add`",
    "invalid_client": "the OAuth client id and secret do not fit each other; correct them, then "
                      "`accounts verify`",
    "invalid_request": "the token endpoint did not understand the request" + _AGAIN,
    "redirect_uri_mismatch": "this OAuth client does not allow a sign-in on this address",
    "invalid_scope": "this OAuth client may not ask for what the provider needs",
    "access_denied": "the sign-in was refused on the vendor's page",
    "admin_policy_enforced": "the organisation's administrator does not allow this sign-in",
    "org_internal": "this OAuth client is for members of another organisation",
    "disallowed_useragent": "the vendor wants this sign-in in a real browser" + _AGAIN,
}


def _clock_skew_s(headers: Mapping[str, str]) -> float:
    """Seconds between the answer's Date and this machine's clock."""
    import email.utils
    try:
        return abs(email.utils.parsedate_to_datetime(headers["date"]).timestamp() - time.time())
    except (LookupError, TypeError, ValueError):
        return 0.0


def oauth_post(provider: Provider, fields: Mapping[str, str], connections: ConnectionCache,
               proxy: str = "") -> tuple[dict, str]:
    """(the token endpoint's answer, "") or ({}, a key of GRANT_ERRORS).  Raises ProxyError
    token_endpoint for everything else: it passes, and never costs an account its place."""
    try:
        status, headers, raw = simple_call(
            connections, "POST", provider.token_url,
            {"Content-Type": "application/x-www-form-urlencoded"},
            urllib.parse.urlencode(fields).encode("ascii"), proxy)
        answer = object_of(json_decode(raw))
    except ProxyError as err:       # a network failure here is not the generating host's
        raise ProxyError("token_endpoint", err.message) from err
    except ValueError:
        answer = {}
    token = answer.get("access_token")
    if status == 200 and isinstance(token, str) and re.fullmatch(r"[!-~]+", token):
        for name in ("access_token", "refresh_token", "id_token"):
            remember_secret(str(answer.get(name) or ""))
        return answer, ""
    error = answer.get("error")
    error = str(object_of(error).get("status") or error or "").lower()
    if error == "invalid_grant" and _clock_skew_s(headers) > 300:
        error = "clock_skew"
    if error in GRANT_ERRORS:
        return {}, error
    raise ProxyError("token_endpoint", f"the token endpoint answered {status}")


def oauth_refresh(refresh_token: str, account: Account, connections: ConnectionCache) -> dict:
    """{"access_token", "expires_in", "refresh_token"?} as answered; every client is tried [O2].
    Raises ProxyError revoked when a person must act, token_endpoint for what passes."""
    pairs = list(dict.fromkeys(pair for provider in account.providers
                               for pair in oauth_clients(provider, connections.environ)))
    if not pairs:
        raise no_client(account.provider)
    errors = []
    for client_id, secret in pairs:
        answer, error = oauth_post(account.provider, {
            "client_id": client_id, "client_secret": secret, "grant_type": "refresh_token",
            "refresh_token": refresh_token}, connections, account.proxy)
        if answer:
            return answer
        errors.append(error)
        if error not in ("unauthorized_client", "invalid_client"):
            break
    said = sorted(errors, key=lambda e: (e == "invalid_client", e == "unauthorized_client"))[0]
    raise ProxyError("revoked", f"{GRANT_ERRORS[said]} ({said})")


# Google's key files: a service account signs for its token, gcloud's own login refreshes it

def _der(data: bytes, at: int = 0) -> tuple[bytes, int]:
    """(content, where the next one begins) of the DER element at `at`."""
    size, begin = data[at + 1], at + 2
    if size & 0x80:
        begin += size & 0x7f
        size = int.from_bytes(data[at + 2:begin], "big")
    return data[begin:begin + size], begin + size


def _der_numbers(data: bytes) -> list[int]:
    numbers, at = [], 0
    while at < len(data):
        value, at = _der(data, at)
        numbers.append(int.from_bytes(value, "big"))
    return numbers


def rs256(message: bytes, pem: str) -> bytes:
    """The signature of RFC 7518's RS256 (PKCS #1 v1.5 with SHA-256) by a key in PKCS #8.  Not in
    constant time: it is done once an hour, and nobody else can start it.  Raises ValueError."""
    try:
        data = base64.b64decode("".join(line for line in pem.splitlines() if "-----" not in line))
        outer, _ = _der(data)
        _, at = _der(outer)                 # version
        _, at = _der(outer, at)             # algorithm
        _, modulus, _, exponent, *_ = _der_numbers(_der(_der(outer, at)[0])[0])
    except (IndexError, ValueError) as err:
        raise ValueError("its private_key is no RSA key in PKCS #8") from err
    size = (modulus.bit_length() + 7) // 8
    # DigestInfo of SHA-256 (RFC 8017, section 9.2)
    info = bytes.fromhex("3031300d060960864801650304020105000420") + hashlib.sha256(
        message).digest()
    padded = b"\0\1" + b"\xff" * (size - len(info) - 3) + b"\0" + info
    return pow(int.from_bytes(padded, "big"), exponent, modulus).to_bytes(size, "big")


def _number(value: Any) -> float:
    """A number that may be told as a text; 0 for anything else."""
    try:
        return 0.0 if isinstance(value, bool) else finite(str(value))
    except ValueError:
        return 0.0


def google_token(info: Any, account: Account, connections: ConnectionCache,
                 now: float) -> tuple[str, float]:
    """(access token, epoch seconds of its end) for a key file: of a service account, or what
    `gcloud auth application-default login` leaves.  Raises ProxyError."""
    info = object_of(info)
    if info.get("type") == "service_account":
        claims = {"iss": info.get("client_email"), "aud": GOOGLE_AUDIENCE, "iat": int(now),
                  "exp": int(now) + 3600, "scope": CLOUD_SCOPE}
        signed = ".".join(base64url(json_encode(part).encode())
                          for part in ({"alg": "RS256", "typ": "JWT"}, claims))
        try:
            mark = rs256(signed.encode(), str(info.get("private_key")))
        except ValueError as err:
            raise ProxyError("no_secret", f"its key file cannot be used: {err}") from err
        fields = {"grant_type": "urn:ietf:params:oauth:grant-type:jwt-bearer",
                  "assertion": f"{signed}.{base64url(mark)}"}
    elif info.get("type") == "authorized_user":
        fields = {"grant_type": "refresh_token", **{
            n: str(info.get(n)) for n in ("client_id", "client_secret", "refresh_token")}}
    else:
        raise ProxyError("no_secret", f"a key file of type {info.get('type')!r} is not supported")
    answer, error = oauth_post(account.provider, fields, connections, account.proxy)
    if not answer:
        raise ProxyError("revoked", f"{GRANT_ERRORS.get(error, 'the key file was refused')} "
                         f"({error})")
    return answer["access_token"], now + max(60.0, min(86400.0, _number(answer.get("expires_in"))
                                                       or 3600.0))


@functools.lru_cache(maxsize=256)
def _filled_agent(text: str, model: str) -> str:
    system = {"win32": "windows"}.get(sys.platform, sys.platform)
    machine = os.uname().machine if hasattr(os, "uname") else os.environ.get(
        "PROCESSOR_ARCHITECTURE", "")
    arch = "arm64" if machine.lower() in ("arm64", "aarch64") else "amd64"
    return text.replace("{os}", system).replace("{arch}", arch).replace(
        "{model}", model or "gemini-2.5-pro")


def user_agent(account: Account, provider: Provider, model: str = "") -> str:
    """The pool's fixed User-Agent with this machine's system in Go's naming."""
    text = account.user_agent if provider.id == account.provider.id else ""
    return _filled_agent(text or provider.user_agent, model)


def call_headers(*sets: Mapping[str, str]) -> dict[str, str]:
    """The head of a call: a later set's value replaces an earlier one's, whatever the spelling;
    lists of betas are joined."""
    spelled: dict[str, str] = {}        # as it came first
    out: dict[str, str] = {}
    for row in sets:
        for name, value in row.items():
            key = name.lower()
            first = spelled.setdefault(key, name)
            if key == "anthropic-beta" and first in out:
                value = f"{out[first]},{value}"
            out[first] = value
    return out


def own_headers(account: Account) -> dict[str, str]:
    """What small calls for a key carry beside it, as generating ones do."""
    return {"User-Agent": user_agent(account, account.provider),
            **call_headers(dict(account.provider.headers), dict(account.headers))}


def auth_header(provider: Provider, token: str) -> dict[str, str]:
    """How the upstream wants to see a key or an access token."""
    if not token:
        return {}               # a server of one's own
    if provider.auth == "google":
        is_token = token.startswith(("ya29.", "ey"))
        return {"Authorization": "Bearer " + token} if is_token else {"x-goog-api-key": token}
    is_bearer = provider.auth in ("bearer", "oauth")
    return {"Authorization": "Bearer " + token} if is_bearer else {provider.auth: token}


class Flights:
    """At most one call per key at a time; who asks meanwhile waits for its result."""

    def __init__(self):
        self._lock = threading.Lock()           # guards _under_way
        self._under_way: dict[Any, list] = {}   # key -> [Event, result, error]

    def is_under_way(self, key: Any) -> bool:
        return key in self._under_way

    def fly(self, key: Any, call: Callable[[], Any]) -> Any:
        with self._lock:
            flight = self._under_way.get(key)
            is_mine = flight is None
            if is_mine:     # the error is for who waits while the call fails in an unforeseen way
                flight = self._under_way[key] = [threading.Event(), None, ProxyError(
                    "token_endpoint", "the token could not be fetched")]
        if is_mine:
            try:
                flight[1:] = call(), None
            except ProxyError as err:
                flight[2] = err
            finally:
                with self._lock:
                    del self._under_way[key]
                flight[0].set()
        elif not flight[0].wait(6 * TOKEN_TIMEOUT_S):
            raise ProxyError("token_endpoint", "the token endpoint does not answer")
        if flight[2] is not None:
            raise flight[2]
        return flight[1]


class Tokens:
    """Access tokens: each refreshed once, however many threads and processes wait.  A refresh holds
    the account's lock file; beside it the token is kept, 0600, for the next process and start."""

    def __init__(self, connections: ConnectionCache, clock: Clock,
                 understand: Callable[[int, Mapping, bytes, float], ProxyError], path: str = "",
                 on_rotate: Callable[[Account, str, str], None] = lambda *_: None):
        self.connections, self.clock, self.path, self.on_rotate = (
            connections, clock, path, on_rotate)        # on_rotate must not raise
        self.understand = understand        # (status, headers, body, now) of a small call's error
        self.flights = Flights()

    def access(self, account: Account, refused: str = "", life_s: float = TOKEN_REFRESH_BEFORE_S,
               is_shared: bool = True) -> str:
        """A token with `life_s` left.  `refused` is one that the upstream answered 401: it is not
        handed out again; nor is one from another process without `is_shared`."""
        with account.lock:
            token, expires_at = account.access_token, account.token_expires_at
            is_alive = token and token != refused
            if is_alive and not expires_at and account.credential != "refresh_token":
                return token        # a static one
            left_s = expires_at - self.clock.now()
            if is_alive and left_s > life_s:
                return token
            failed = account.failure
            if failed and self.clock.monotonic() - failed[0] < 5:
                raise failed[1]
        try:
            return self.flights.fly(account, lambda: self._renew(account, refused, life_s,
                                                                 is_shared))
        except ProxyError as err:
            if err.kind == "token_endpoint" and is_alive and left_s > 30:
                return token        # short-lived is better than none
            raise

    def _renew(self, account: Account, refused: str, life_s: float, is_shared: bool) -> str:
        """Asks without the account's lock, then publishes failure or token, unless somebody signed
        in anew meanwhile."""
        failure = None
        try:
            if account.credential == "refresh_token":
                secret, token, expires_at = self._shared_refresh(account, refused, life_s,
                                                                 is_shared)
            else:
                secret = account.secret
                token, expires_at = resolve_secret(secret) if secret else "", 0.0
                if token.startswith("{"):
                    token, expires_at = google_token(json_decode(token.encode()), account,
                                                     self.connections, self.clock.now())
                if refused and token == refused:
                    raise ProxyError("revoked", "the credential is not accepted; put a new one "
                                     "into accounts.json")
            with account.lock:
                if account.secret == secret:
                    account.access_token, account.token_expires_at = token, expires_at
            return token
        except ConfigError as err:
            raise ProxyError("no_secret", f"its secret cannot be had: {err}") from err
        except ProxyError as err:
            if err.kind == "token_endpoint":    # others stop the account: no need to repeat them
                failure = self.clock.monotonic(), err
            raise
        finally:
            with account.lock:
                account.failure = failure

    def _shared_refresh(self, account: Account, refused: str, life_s: float,
                        is_shared: bool) -> tuple[str, str, float]:
        """(refresh token as it is stored, access token, epoch seconds of its end)."""
        if not self.path:
            return self._refresh(account)
        kept_path = self.kept_path(account.name)
        with contextlib.ExitStack() as stack:
            try:
                os.makedirs(os.path.dirname(kept_path), mode=0o700, exist_ok=True)
                stack.enter_context(file_lock(kept_path, 3 * TOKEN_TIMEOUT_S))
            except OSError as err:
                if err.errno == errno.EBUSY:    # refreshed elsewhere: twice would spend it
                    raise ProxyError("token_endpoint", "another process is refreshing it") from err
                return self._refresh(account)   # no place for a lock: on our own
            self._take_over_rotation(account)
            kept = self._kept(kept_path, account.secret) if is_shared else None
            if kept and kept[1] != refused and kept[2] - self.clock.now() > life_s:
                return kept
            tried = account.secret
            try:
                secret, token, expires_at = self._refresh(account)
            except ProxyError as err:
                if err.kind != "revoked" or (not self._take_over_rotation(account)
                                             and account.secret == tried):
                    raise
                secret, token, expires_at = self._refresh(account)      # rotated while we asked
            with contextlib.suppress(OSError):      # it is only spared the next process
                write_atomic(kept_path, json_encode({
                    "access_token": token, "expires_at": expires_at,
                    "of": hash_of_secret(secret)}).encode("ascii"))
            return secret, token, expires_at

    def kept_path(self, name: str) -> str:
        """Where an account's access token is kept for the next process."""
        return os.path.join(os.path.dirname(os.path.realpath(self.path)), "tokens",
                            hashlib.sha256(name.encode("utf-8")).hexdigest()[:16])

    def _kept(self, path: str, secret: str) -> tuple[str, str, float] | None:
        try:
            with open(path, "rb") as handle:
                kept = json_decode(handle.read())
            if kept["of"] == hash_of_secret(secret):
                remember_secret(kept["access_token"])
                expires_at = float(kept["expires_at"])
                if expires_at <= self.clock.now() + 86400:      # else the clock was set back
                    return secret, str(kept["access_token"]), expires_at
        except (OSError, ValueError, LookupError, TypeError):
            pass        # none, or not ours to understand: a refresh replaces it
        return None

    def _take_over_rotation(self, account: Account) -> bool:
        """Whether the accounts file holds a newer refresh token; it is used from now on."""
        try:
            stored = read_accounts_file(self.path)
        except ConfigError:
            return False        # being edited: what we have is as good
        for name, row in stored_accounts(stored):
            new = row.get("refresh_token")
            with account.lock:
                if name == account.name and isinstance(new, str) and new not in (
                        "", account.secret, *account.spent):
                    account.secret = new
                    return True
        return False

    def _refresh(self, account: Account) -> tuple[str, str, float]:
        """As `_shared_refresh`, from the token endpoint."""
        stored = account.secret
        secret = resolve_secret(stored)
        answer = oauth_refresh(secret, account, self.connections)
        new, lifetime = answer.get("refresh_token"), answer.get("expires_in")
        if isinstance(new, str) and re.fullmatch(r"[!-~]+", new) and new != secret:
            with account.lock:
                is_same = account.secret == stored      # nobody signed in anew meanwhile
                account.secret = new if is_same else account.secret
                account.spent.add(stored)               # whatever happens to the new one [O4]
            if is_same:
                self.on_rotate(account, stored, new)    # on disk before it is used
            stored = new
        try:
            lifetime = min(86400.0, max(60.0, float(lifetime)))
        except (TypeError, ValueError):
            lifetime = 3600.0
        return stored, answer["access_token"], self.clock.now() + lifetime


# Projects, tiers and quotas of Cloud Code accounts

def cloud_call(account: Account, provider: Provider, token: str, method: str, body: Any,
               tokens: Tokens, timeout_s: float = TOKEN_TIMEOUT_S) -> dict:
    """The answer of the first host that answers at all [O6]; raises what an error answer means."""
    headers = {**auth_header(provider, token), "Content-Type": "application/json",
               "User-Agent": user_agent(account, provider)}
    failure = ProxyError("network", f"{provider.id} has no base_url")
    for base_url in provider.base_urls:
        try:
            status, told, raw = simple_call(tokens.connections, "POST",
                                            f"{base_url}/v1internal:{method}", headers,
                                            json_encode(body).encode("ascii"), account.proxy,
                                            timeout_s)
            if status == 200:
                return object_of(json_decode(raw))
            failure = tokens.understand(status, told, raw, tokens.clock.now())
        except ProxyError as err:
            failure = err
        except ValueError:
            failure = ProxyError("server", f"{method} answered no JSON")
        if failure.rule.scope is not Scope.HOST and failure.kind != "model_missing":
            break
    raise failure


_NO_PROJECTS = ("", "ALL", "rising-fact-p41fc")     # the last one is shared by many programs


def _project_of(answer: Mapping) -> str:
    """The project id of an answer, which writes it as text or object; a shared one is none."""
    project = answer.get("cloudaicompanionProject")
    project = project.get("id") if isinstance(project, dict) else project
    return project if isinstance(project, str) and project not in _NO_PROJECTS else ""


def _tier_of(answer: Mapping) -> str:
    """free, pro or ultra; paid before current before the default of the allowed ones."""
    rows = [answer.get("paidTier"), answer.get("currentTier"), *(
        t for t in objects_of(answer.get("allowedTiers")) if t.get("isDefault"))]
    name = next((str(r["id"]) for r in map(object_of, rows) if r.get("id")), "")
    return ("ultra" if "ultra" in name else "pro" if re.search("pro|premium|standard", name)
            else "free" if name else "")


def onboard(account: Account, provider: Provider, token: str, loaded: Mapping, metadata: Mapping,
            tokens: Tokens, pause: Callable[[float], None]) -> str:
    """The project Google makes for a new account, "" for none; the call repeated polls for it."""
    allowed = objects_of(loaded.get("allowedTiers"))
    tier = next((t for t in allowed if t.get("isDefault")), allowed[0] if allowed else {})
    body = {"tierId": str(tier.get("id") or "free-tier"), "metadata": dict(metadata)}
    if tier.get("userDefinedCloudaicompanionProject") and account.project:
        body["cloudaicompanionProject"] = account.project
    for _ in range(ONBOARD_TRIES):
        answer = cloud_call(account, provider, token, "onboardUser", body, tokens)
        if answer.get("done"):
            return _project_of(object_of(answer.get("response")))
        pause(ONBOARD_PAUSE_S)
    return ""


def _absence(refused: list[dict]) -> str:
    """Why an account without project cannot use the pool, "" if it can.  Raises ProxyError
    validation where its owner can act."""
    for row in refused:
        if row.get("validationUrl") or row.get("reasonCode") == "VALIDATION_REQUIRED":
            told = row.get("validationUrl") or row.get("validationErrorMessage") or "sign in there"
            raise ProxyError("validation", f"Google wants this account verified: {told}; then "
                             "`accounts verify`")
    if any(row.get("reasonCode") == "UNSUPPORTED_CLIENT" for row in refused):
        return ("Google no longer serves individual accounts here (UNSUPPORTED_CLIENT); the "
                "antigravity sign-in or an API key does")
    told = [str(row.get("reasonMessage") or row.get("reasonCode") or "?") for row in refused]
    return f"not eligible: {redact(told[0])}" if told else ""


def discover(account: Account, provider: Provider, token: str, tokens: Tokens,
             pause: Callable[[float], None] = time.sleep) -> Facts:
    """What Google says of this account in this pool: project, tier, or why it is absent.  A new
    account is signed up first, a minute at most.  Raises ProxyError, validation for the owner."""
    configured = account.project or tokens.connections.environ.get("GOOGLE_CLOUD_PROJECT", "")
    is_cli = provider.envelope == "gemini-cli"
    metadata = {"ideType": "IDE_UNSPECIFIED" if is_cli else "ANTIGRAVITY", "pluginType": "GEMINI"}
    body: dict = {"metadata": metadata}
    if is_cli:
        metadata["platform"] = "PLATFORM_UNSPECIFIED"
        if configured:
            body["cloudaicompanionProject"] = metadata["duetProject"] = configured
    answer = cloud_call(account, provider, token, "loadCodeAssist", body, tokens)
    project, tier = account.project or _project_of(answer), _tier_of(answer)
    refused = objects_of(answer.get("ineligibleTiers"))
    absent = "" if project else _absence(refused)
    if not project and not refused:
        project = onboard(account, provider, token, answer, metadata, tokens, pause)
    if not project and is_cli and not absent:
        absent = "" if configured else ("no licensed project: set `project` of the account, or "
                                        "GOOGLE_CLOUD_PROJECT, then `accounts verify`")
        project = configured
    return Facts(project, tier, absent, (), tokens.clock.now())


def pool_facts(pool: AccountPool, tokens: Tokens, account: Account, provider: Provider, token: str,
               again: bool = False, pause: Callable[[float], None] = time.sleep) -> Facts:
    """What is known of an account's pool, asked for once a day or `again`; one asks, others wait,
    he by `pause` while Google signs the account up.  Raises ProxyError for what stands in the way;
    what passes leaves the facts as they were."""
    facts = pool.facts((account.name, provider.id))
    lasts_s = ABSENT_LASTS_S if facts and facts.absent else FACTS_LAST_S
    if facts and not again and facts.absent != LOOK_AGAIN and (
            abs(tokens.clock.now() - facts.at) < lasts_s):
        return facts

    def ask() -> Facts:
        try:
            found = discover(account, provider, token, tokens, pause)
            found = found._replace(models=facts.models) if facts else found
        except ProxyError as err:
            if again or err.rule.scope is not Scope.HOST and err.rule.status != 429:
                raise
            # the call that matters may go through; asked again in five minutes
            known = facts if facts and facts.absent != LOOK_AGAIN else Facts("", "", "", (), 0)
            found = known._replace(at=tokens.clock.now() - lasts_s + 300)
        pool.note_facts((account.name, provider.id), found)
        return found
    return tokens.flights.fly((account, provider.id), ask)


def _fraction(row: Mapping) -> float | None:
    """What is left, 0 to 1 [O5]; None where that is not told."""
    value = row.get("remainingFraction")
    if row.get("isExhausted") is True or (value is None and row.get("resetTime")):
        return 0.0
    try:
        return max(0.0, min(1.0, float(value)))
    except (TypeError, ValueError):
        return None


def _window(scope: str, window: str, row: Mapping, now: float) -> Window:
    return Window(scope, window, _fraction(row),
                  parse_timestamp(str(row.get("resetTime") or "")) or 0.0, now)


def _listed_model(name: str, row: Mapping) -> Model:
    """A catalogue entry as a Model row: ours where we know it."""
    def number(cell: str) -> int:
        return row[cell] if type(row.get(cell)) is int else 0
    return MODELS.get(name) or model_from_id(
        name, str(row.get("displayName") or ""), context=number("maxTokens"),
        output=number("maxOutputTokens"), least=number("minThinkingBudget"),
        budget=number("thinkingBudget"))


def read_quota(account: Account, provider: Provider, token: str, project: str,
               tokens: Tokens) -> tuple[list[Window], tuple]:
    """(readings, the account's catalogue or ()) of one pool, by its free calls.  What an answer
    does not tell stays unknown; raises ProxyError when the main call is refused."""
    body, now = {"project": project} if project else {}, tokens.clock.now()
    def ask(method: str) -> dict:
        return cloud_call(account, provider, token, method, body, tokens, QUOTA_TIMEOUT_S)
    if provider.envelope == "gemini-cli":
        buckets = objects_of(ask("retrieveUserQuota").get("buckets"))
        return [_window(str(row["modelId"]), str(row.get("tokenType") or "quota").lower(), row, now)
                for row in buckets if row.get("modelId")], ()
    answer = ask("fetchAvailableModels")
    listed = {name: object_of(row) for name, row in object_of(
        answer.get("models") or object_of(answer.get("response")).get("models")).items()
        if name.startswith(("gemini-", "claude-", "gpt-"))}
    models = tuple(_listed_model(name, row) for name, row in listed.items()
                   if not (row.get("isInternal") or row.get("disabled")))
    windows = [_window(name, "model", row["quotaInfo"], now) for name, row in listed.items()
               if isinstance(row.get("quotaInfo"), dict)]
    with contextlib.suppress(ProxyError):       # the only source of weekly limits, but a later one
        answer = ask("retrieveUserQuotaSummary")
        groups = objects_of(object_of(answer.get("quotaSummary") or answer).get("groups"))
        for bucket in (b for g in groups for b in objects_of(g.get("buckets"))):
            name = str(bucket.get("bucketId") or bucket.get("displayName") or "").lower()
            window = str(bucket.get("window") or ("weekly" if "week" in name else "5h"))
            group = "3p" if "3p" in name or "claude" in name else (
                "gemini-image" if "image" in name else "gemini")
            windows.append(_window(group, window, bucket, now))
    return windows, models


_LIMIT_HEADERS = (      # remaining-or-used header, what its number is, its limit and reset headers
    (re.compile(r"(anthropic-ratelimit-unified-(5h|7d))-utilization"), "used", "", r"\1-reset"),
    (re.compile(r"(x-codex-(primary|secondary))-used-percent"), "percent", "", r"\1-reset-at"),
    (re.compile(r"(anthropic-ratelimit-([a-z-]+))-remaining"), "left", r"\1-limit", r"\1-reset"),
    (re.compile(r"(x-ratelimit)-remaining-(requests|tokens)"), "left", r"\1-limit-\2",
     r"\1-reset-\2"),
)
_WINDOW_WORDS = {"7d": "weekly", "primary": "5h", "secondary": "weekly"}


def _header_reset_at(headers: Mapping[str, str], name: str, now: float) -> float:
    """Epoch seconds of a reset told in any of the families' forms, 0 where none is told."""
    told = headers.get(name, "")
    after = headers.get(name.replace("-reset-at", "-reset-after-seconds"), "") or told
    if re.fullmatch(r"[0-9]{9,12}", told):
        return float(told)
    if re.fullmatch(r"[0-9]{1,8}", after):
        return now + int(after)
    in_s = parse_duration_s(told)
    return now + in_s if in_s is not None else parse_timestamp(told) or 0.0


def _header_window(headers: Mapping[str, str], name: str, now: float) -> Window | None:
    for pattern, meaning, limit, reset in _LIMIT_HEADERS:
        match = pattern.fullmatch(name)
        if match:
            break
    if not match or not re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,12})?", headers[name]):
        return None
    reset_at, value = _header_reset_at(headers, match.expand(reset), now), float(headers[name])
    left = 1 - value / 100 if meaning == "percent" else 1 - value
    if meaning == "left":
        most = headers.get(match.expand(limit), "")
        if not re.fullmatch(r"[1-9][0-9]{0,11}", most) or reset_at < now + 3600:
            return None
        left = value / int(most)
    return Window("account", _WINDOW_WORDS.get(match[2], match[2]), max(0.0, min(1.0, left)),
                  reset_at, now)


def read_limit_headers(headers: Mapping[str, str], now: float) -> list[Window]:
    """Readings from the limit headers of the Anthropic, OpenAI and Codex families.  Windows of
    minutes are left out: they say nothing of what is left to the account."""
    told = [_header_window(headers, name, now) for name in headers
            if "limit" in name or name.startswith("x-codex")]
    return [window for window in told if window]


def _zai_windows(answer: Mapping, now: float) -> list[Window]:
    rows = objects_of(object_of(answer.get("data")).get("limits"))
    words = {("TOKENS_LIMIT", 3): "5h", ("TOKENS_LIMIT", 6): "weekly"}
    return [Window("account" if (r.get("type"), r.get("unit")) in words else "tools",
                   words.get((r.get("type"), r.get("unit")), "monthly"),
                   max(0.0, 1 - _number(r.get("percentage")) / 100),
                   _number(r.get("nextResetTime")) / 1000, now) for r in rows]


def _kimi_windows(answer: Mapping, now: float) -> list[Window]:
    def window(name: str, row: Mapping) -> Window | None:
        most = _number(row.get("limit"))
        left = _number(row.get("remaining")) if "remaining" in row else most - _number(
            row.get("used"))
        told = next((row[n] for n in ("reset_at", "resetAt", "reset_time", "resetTime")
                     if row.get(n)), "")
        after = next((_number(row[n]) for n in ("reset_in", "resetIn", "ttl") if n in row), 0.0)
        at = parse_timestamp(str(told)) or (now + after if after else 0.0)
        return Window("account", name, max(0.0, min(1.0, left / most)), at, now) if most else None
    rows = [window("weekly", object_of(answer.get("usage")))]
    for row in objects_of(answer.get("limits")):
        span = object_of(row.get("window"))
        name = f"{span.get('duration')} {str(span.get('timeUnit') or '').lower()}".strip()
        rows.append(window("5h" if name.startswith(("300 ", "5 h")) else name,
                           object_of(row.get("detail"))))
    return [row for row in rows if row]


def _balance_windows(answer: Mapping, now: float) -> list[Window]:
    """Money that is left says when nothing is left, and no fraction."""
    told = [object_of(answer.get("data")).get("available_balance"),
            *(row.get("total_balance") for row in objects_of(answer.get("balance_infos")))]
    known = [_number(value) for value in told if value is not None]
    left = None if max(known, default=1) > 0 else 0.0
    return [Window("account", "balance", left, 0.0, now)] if known else []


def _openrouter_windows(answer: Mapping, now: float) -> list[Window]:
    row = object_of(answer.get("data"))
    most = _number(row.get("limit"))
    left = _number(row.get("limit_remaining"))
    return [Window("account", "credits", max(0.0, min(1.0, left / most)), 0.0, now)] if most else []


QUOTA_FORMS: dict[str, Callable[[Mapping, float], list[Window]]] = {
    # form of a provider's quota answer -> its windows (the vendors' pages, and clients' sources)
    "zai": _zai_windows, "kimi": _kimi_windows, "balance": _balance_windows,
    "openrouter": _openrouter_windows}


def read_key_quota(account: Account, connections: ConnectionCache, now: float) -> list[Window]:
    """What is left to a key, by its provider's free reading.  Raises ProxyError."""
    provider = account.provider
    status, _, raw = simple_call(
        connections, "GET", provider.quota,
        call_headers(auth_header(provider, resolve_secret(account.secret)), own_headers(account)),
        None, account.proxy, QUOTA_TIMEOUT_S)
    with contextlib.suppress(ValueError, TypeError, OverflowError):     # no JSON, or an odd one
        if status == 200:
            told = QUOTA_FORMS[provider.quota_form](object_of(json_decode(raw)), now)
            return [w._replace(reset_at=0.0) if w.reset_at > now + LATEST_RESET_S else w
                    for w in told]
    raise ProxyError("server", f"its quota could not be read: status {status}")


_LISTS = {      # dialect -> path of its free list, the list's member, more headers
    "gemini": ("/v1beta/models?pageSize=1", "models", {}),
    "anthropic": ("/v1/models?limit=1000", "data", {"anthropic-version": "2023-06-01"}),
    "chat": ("/models", "data", {}), "responses": ("/models", "data", {}),
}
_SIZES = {      # what a list's row may call a model's limits
    "context": ("context_length", "context_window", "max_model_len", "max_context_length",
                "max_input_tokens", "inputTokenLimit"),
    "output": ("max_output_tokens", "max_completion_tokens", "max_tokens", "outputTokenLimit")}


def _listed_row(row: Mapping) -> Model:
    """A row of an upstream's list with what sizes it tells."""
    limits = {what: next((row[n] for n in names if type(row.get(n)) is int and row[n] > 0), 0)
              for what, names in _SIZES.items()}
    return model_from_id(row["id"], str(row.get("display_name") or row.get("name") or ""), **limits)


def check_key(account: Account, connections: ConnectionCache) -> tuple[Model, ...]:
    """The models that a key's upstream lists, by one free call; () where it has no list.  Raises
    ProxyError revoked when the key is not accepted."""
    path, member, headers = _LISTS[account.provider.dialect]
    secret = resolve_secret(account.secret) if account.secret else ""
    if account.provider.catalogue == "vertex":      # has no free list; a token is proof enough
        if secret.startswith("{"):
            google_token(json_decode(secret.encode()), account, connections, time.time())
        return ()
    status, _, raw = simple_call(
        connections, "GET", account.provider.base_urls[0] + path,
        call_headers(auth_header(account.provider, secret), headers, own_headers(account)),
        None, account.proxy)
    try:
        answer = object_of(json_decode(raw))
    except ValueError:
        answer = {}
    if isinstance(answer.get("models"), list) and member == "data":
        member = "models"
    if status in (200, 404, 405, 501) and member not in answer and (
            account.provider.catalogue == "as asked"):
        return ()               # a server that is merely compatible
    if status != 200 or member not in answer:
        message = object_of(answer.get("error")).get("message") or f"status {status}, no model list"
        is_refused = status in (400, 401, 403)
        told = "the key was not accepted" if is_refused else "its models could not be listed"
        raise ProxyError("revoked" if is_refused else "server", f"{told}: {redact(str(message))}")
    rows = (row for row in objects_of(answer[member]) if isinstance(row.get("id"), str)
            and 0 < len(row["id"]) <= MAX_MODEL_NAME and row["id"].isprintable())
    return tuple(MODELS.get(row["id"]) or _listed_row(row)
                 for row in itertools.islice(rows, MOST_LISTED))


# The browser sign-in

def oauth_email(provider: Provider, answer: Mapping, connections: ConnectionCache) -> str:
    """Whose sign-in it is: from the identity token, else from the user-info call, else ""."""
    with contextlib.suppress(ValueError, LookupError, AttributeError):   # no identity token: ask
        part = str(answer["id_token"]).split(".")[1]
        claims = json_decode(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
        if claims.get("email"):
            return str(claims["email"])
    with contextlib.suppress(ProxyError, ValueError, AttributeError):   # only a name is lost
        _, _, raw = simple_call(connections, "GET", provider.userinfo_url,
                                {"Authorization": "Bearer " + answer["access_token"]})
        return str(json_decode(raw).get("email") or "")
    return ""


def browser_hint(environ: Mapping[str, str]) -> str:
    """What to do where no browser can be opened here; "" on a desktop."""
    def is_set(*names: str) -> bool:
        return any(environ.get(name) for name in names)
    elsewhere = ("open the link on your own machine.  Its last page will not load there; paste its "
                 "address here.")
    perhaps = "If its last page does not load, paste its address here."
    if is_set("SSH_CONNECTION", "SSH_TTY"):
        return (f"This is an SSH session: {elsewhere}  Or forward the port first: "
                "ssh -L {port}:localhost:{port} ...")
    if is_set("KUBERNETES_SERVICE_HOST", "CODESPACES") or any(
            map(os.path.exists, ("/.dockerenv", "/run/.containerenv"))):
        return f"This is a container: {elsewhere}"
    if is_set("WSL_DISTRO_NAME"):
        return f"This is WSL: open the link in a browser on Windows.  {perhaps}"
    if sys.platform.startswith("linux") and not is_set("DISPLAY", "WAYLAND_DISPLAY"):
        return f"No screen is attached: open the link in any browser.  {perhaps}"
    return ""


CALLBACK_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>agproxy</title>
<meta name="viewport" content="width=device-width"><style>body{font:1.1rem/1.5 system-ui,sans-serif;
max-width:32rem;margin:20vh auto;padding:0 1rem;color-scheme:light dark}</style>
<h1>agproxy</h1><p>%s</p></html>"""


CALLBACK_HEADERS = (
    ("Referrer-Policy", "no-referrer"), ("Cache-Control", "no-store"),
    ("X-Content-Type-Options", "nosniff"),
    ("Content-Security-Policy",
     "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"))


class Login:
    """One browser sign-in: PKCE, a single-use state, a loopback listener that is open only while
    the sign-in waits, and pasted answers; the first good one wins, a wrong one ends nothing.
    Whoever brings the state takes `_turn`; a code that was none gives it back."""

    def __init__(self, provider: Provider, clients: list[tuple[str, str]],
                 environ: Mapping[str, str]):
        import secrets
        self.provider, self.clients = provider, clients
        self._verifier, self.state = secrets.token_urlsafe(64), secrets.token_urlsafe(24)
        self._turn = threading.Lock()
        for secret in (self._verifier, self.state):
            remember_secret(secret)
        self._answers: queue.Queue = queue.Queue()      # (code, refusal)
        self._listener = self._listen(environ)
        port = self._listener.server_address[1] if self._listener else provider.ports[0]
        self.redirect = provider.redirect.format(port=port)
        if provider.scopes:
            asked = {"client_id": clients[0][0], "redirect_uri": self.redirect, "state": self.state,
                     "response_type": "code", "scope": provider.scopes,
                     "access_type": "offline", "prompt": "consent"}     # [O3]
        else:                       # OpenRouter's way: no client, the answer is a key
            self.redirect += "?state=" + self.state
            asked = {"callback_url": self.redirect}
        challenge = base64url(hashlib.sha256(self._verifier.encode()).digest())
        self.port, self.url = port, provider.auth_url + "?" + urllib.parse.urlencode({
            **asked, "code_challenge_method": "S256", "code_challenge": challenge})

    def take(self, text: str) -> str:
        """Takes the address of the last page, or its query; a bare code could be of anybody's
        sign-in.  "" when it was taken, else what is wrong with it."""
        text = text.strip().strip("\"'<>")
        try:
            query = urllib.parse.urlsplit(text).query if "://" in text else text.lstrip("?")
        except ValueError:
            return "that is no address"
        fields = dict(urllib.parse.parse_qsl(query)) if "=" in query else {}
        if not hmac.compare_digest(fields.get("state", "").encode("utf-8", "replace"),
                                   self.state.encode()):
            return "that does not belong to this sign-in"
        if not (fields.get("error") or fields.get("code")):
            return "that holds no code"
        if not self._turn.acquire(blocking=False):
            return "this sign-in was answered already"
        remember_secret(fields.get("code"))
        self._answers.put(("", fields["error"]) if fields.get("error") else (fields["code"], ""))
        return ""

    def wait(self, timeout_s: float = LOGIN_WAIT_S) -> str:
        """The authorization code; raises ProxyError revoked when it is refused or never comes."""
        try:
            code, error = self._answers.get(timeout=timeout_s)
        except queue.Empty:
            raise ProxyError("revoked", f"no answer within {human_s(timeout_s)}; "
                             "run `accounts add` again") from None
        if error:
            why = GRANT_ERRORS.get(error, "the vendor's page refused the sign-in")
            raise ProxyError("revoked", f"{why} ({redact(error)})")
        return code

    def exchange(self, code: str, connections: ConnectionCache) -> dict:
        """The token endpoint's answer with its `refresh_token`; the secret that worked comes first
        in `clients` then.  Where it raises, another answer may be taken."""
        try:
            return (self._exchange_for_token if self.provider.scopes else
                    self._exchange_for_key)(code, connections)
        except ProxyError:
            if self._turn.locked():
                self._turn.release()
            raise

    def _exchange_for_token(self, code: str, connections: ConnectionCache) -> dict:
        error = ""      # a refused secret does not use up the code
        for client_id, secret in [c for c in self.clients if c[0] == self.clients[0][0]]:
            answer, error = oauth_post(self.provider, {
                "client_id": client_id, "client_secret": secret, "code": code,
                "grant_type": "authorization_code", "redirect_uri": self.redirect,     # [O1]
                "code_verifier": self._verifier}, connections)
            if answer.get("refresh_token"):
                self.clients.insert(0, (client_id, secret))
                return answer
            if error != "invalid_client":
                break
        if error == "invalid_grant":
            raise ProxyError("revoked", "that code is wrong, or was used already")
        why = GRANT_ERRORS.get(error, "the vendor gave no refresh token")
        raise ProxyError("revoked", f"{why} ({redact(error) or 'no refresh_token'})")

    def _exchange_for_key(self, code: str, connections: ConnectionCache) -> dict:
        status, _, raw = simple_call(
            connections, "POST", self.provider.token_url, {"Content-Type": "application/json"},
            json_encode({"code": code, "code_verifier": self._verifier,
                         "code_challenge_method": "S256"}).encode())
        with contextlib.suppress(ValueError):       # no JSON: no key either
            key = object_of(json_decode(raw)).get("key")
            if status == 200 and isinstance(key, str):
                remember_secret(key)
                return {"key": key}
        raise ProxyError("revoked", f"that code is wrong, or was used already ({status})")

    def close(self) -> None:
        listener, self._listener = self._listener, None
        if listener:
            threading.Thread(target=listener.shutdown, daemon=True).start()

    def _listen(self, environ: Mapping[str, str]) -> Any:
        """The first port of the list that is free, else any; None where nothing can be bound."""
        login, path = self, urllib.parse.urlsplit(self.provider.redirect).path

        class Callback(http.server.BaseHTTPRequestHandler):
            """Answers the vendor's redirect; nothing of the query is echoed or logged."""
            timeout = 10

            def do_GET(self) -> None:
                target, _, query = self.path.partition("?")
                if target != path or login.take("?" + query):
                    self.send_error(400)
                else:
                    self.answer(200, "The sign-in was refused." if "error=" in query else "Signed "
                                "in: you can close this page and go back to the terminal.")

            def send_error(self, *args: Any) -> None:       # its own would tell the request's line
                self.answer(400, "This sign-in is not expected here.")

            def answer(self, status: int, text: str) -> None:
                data = (CALLBACK_PAGE % text).encode("ascii")
                self.send_response(status)
                self.send_header("Content-Type", "text/html; charset=utf-8")
                self.send_header("Content-Length", str(len(data)))
                for name, value in CALLBACK_HEADERS:
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: Any) -> None:
                pass

        wanted = environ.get("OAUTH_CALLBACK_PORT", "")
        ports = (int(wanted),) if wanted.isdigit() else self.provider.ports
        for port in (*ports, 0):
            with contextlib.suppress(OSError, OverflowError):   # busy or reserved: the next
                listener = http.server.ThreadingHTTPServer(("127.0.0.1", port), Callback)
                threading.Thread(target=lambda: (listener.serve_forever(0.1),
                                                 listener.server_close()), daemon=True).start()
                return listener
        return None


# OAuth clients in the vendors' own installed programs

_CLIENT_ID = re.compile(rb"\d{6,}-[a-z0-9]{20,}\.apps\.googleusercontent\.com")
_CLIENT_SECRET = re.compile(rb"GOCSPX-[A-Za-z0-9_-]{28}")


def client_files(provider: Provider, environ: Mapping[str, str]) -> Iterator[str]:
    """Files of the provider's installed program that may hold its OAuth client, likeliest first."""
    import glob
    import shutil
    home = os.path.expanduser("~")
    if provider.envelope == "gemini-cli":
        program = shutil.which("gemini", path=environ.get("PATH"))
        roots = [os.path.dirname(os.path.realpath(program))] if program else []
        roots += [os.path.dirname(r) for r in roots]
        for base in ("/usr/local/lib", "/usr/lib", "/opt/homebrew/lib", home + "/.npm-global/lib",
                     environ.get("APPDATA", home) + "/npm",
                     *sorted(glob.glob(home + "/.nvm/versions/node/*/lib"), reverse=True)):
            roots.append(base + "/node_modules/@google/gemini-cli")
        patterns = ("bundle/gemini.js", "bundle/*.js", "*.js", "node_modules/@google/gemini-cli-"
                    "core/dist/src/code_assist/oauth2.js")
    else:
        roots = [base + name for base in (
            "/Applications/", home + "/Applications/", "/usr/share/", "/opt/", "/snap/",
            environ.get("LOCALAPPDATA", home) + "/Programs/")
            for name in ("Antigravity.app/Contents/Resources", "Antigravity/resources",
                         "antigravity/resources", "antigravity/current/resources",
                         "Antigravity IDE/resources", "Antigravity IDE.app/Contents/Resources")]
        patterns = ("app/out/main.js", "app/out/**/*.js", "app/extensions/antigravity/**/*.js",
                    "app/extensions/antigravity/bin/language_server_*")
        program = shutil.which("agy", path=environ.get("PATH"))
        if program:
            yield os.path.realpath(program)
    for root in roots:
        for pattern in patterns if os.path.isdir(root) else ():
            yield from sorted(glob.glob(os.path.join(glob.escape(root), pattern), recursive=True))


def discover_clients(provider: Provider, environ: Mapping[str, str]) -> list[tuple[str, str]]:
    """Every (id, secret) combination of the first installed file that holds both; [] for none.
    The files hold several clients: the token endpoint tells which two fit."""
    for path in client_files(provider, environ):
        try:
            with open(path, "rb") as handle:
                data = handle.read(256 << 20)
        except OSError:
            continue            # not readable for us: another file may be
        ids, found = dict.fromkeys(_CLIENT_ID.findall(data)), _CLIENT_SECRET.findall(data)
        if ids and found:
            pairs = [(i.decode(), s.decode()) for i in ids for s in dict.fromkeys(found)]
            for _, secret in pairs:
                remember_secret(secret)
            return pairs
    return []


# Credentials of other programs: read-only, never written back

IMPORT_SOURCES = {      # name -> files and folders, the first with accounts counts
    "gemini-cli": ("$GEMINI_CLI_HOME/.gemini/oauth_creds.json", "~/.gemini/oauth_creds.json"),
    "antigravity": tuple(
        f"{base}/{name}/User/globalStorage/state.vscdb" for base in (
            "~/Library/Application Support", "$APPDATA", "$XDG_CONFIG_HOME", "~/.config")
        for name in ("Antigravity", "Antigravity IDE")),
    "opencode": tuple(f"{base}/antigravity-accounts.json" for base in (
        "$OPENCODE_CONFIG_DIR", "$XDG_CONFIG_HOME/opencode", "~/.config/opencode",
        "$APPDATA/opencode")),
    "antigravity-claude-proxy": ("~/.config/antigravity-proxy/accounts.json",),
    "ag-cl": ("~/.config/antigravity-proxy/accounts.json",),
    "multi-claude-proxy": ("~/.config/multi-claude-proxy/accounts.json",),
    "agcp": ("~/.config/agcp/accounts.json", "~/.config/agcp/account.json"),
    "antigravity-manager": ("$ABV_DATA_DIR/accounts", "~/.antigravity_tools/accounts",
                            "~/.antigravity-agent/antigravity_accounts.json"),
    "cliproxyapi": ("~/.cli-proxy-api",),
}


def proto_fields(data: bytes) -> dict[int, list]:
    """Field number -> values (int or bytes) of a protobuf message; raises ValueError for others."""
    fields: dict[int, list] = {}
    at = 0

    def varint() -> int:
        nonlocal at
        number = shift = 0
        while True:
            if at >= len(data) or shift > 63:
                raise ValueError("not a message")
            byte, at = data[at], at + 1
            number |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return number

    while at < len(data):
        key = varint()
        kind = key & 7
        if kind == 0:
            value: Any = varint()
        else:
            size = {1: 8, 5: 4}.get(kind) or (varint() if kind == 2 else 0)
            if kind not in (1, 2, 5) or at + size > len(data):
                raise ValueError("not a message")
            value, at = data[at:at + size], at + size
        fields.setdefault(key >> 3, []).append(value)
    return fields


def _proto_inside(value: bytes) -> dict[int, list]:
    """The message in `value`, which is one, or its base64."""
    with contextlib.suppress(ValueError):       # then it is the message itself
        return proto_fields(base64.b64decode(value + b"=" * (-len(value) % 4), validate=True))
    return proto_fields(value)


def _token_info(value: bytes) -> str:
    """The refresh token of an OAuthTokenInfo message, its base64, or a Row that holds either."""
    for _ in range(2):
        fields = _proto_inside(value)
        if 3 in fields:
            return fields[3][0].decode("ascii")
        value = fields[1][0]
    return ""


def antigravity_credentials(path: str) -> dict:
    """{"refresh_token", "email"} of either layout of Antigravity's state database, {} for none."""
    import sqlite3
    values: dict[str, bytes] = {}
    for mode in ("mode=ro", "mode=ro&immutable=1"):     # the second reads one that is locked
        with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(
                "file:" + urllib.parse.quote(path) + "?" + mode, uri=True, timeout=0.5)) as db:
            values = {k: v if isinstance(v, bytes) else str(v).encode() for k, v in db.execute(
                "SELECT key, value FROM ItemTable WHERE key LIKE 'antigravity%' "
                "OR key LIKE 'jetski%'")}
            break
    email = token = ""
    odd = (ValueError, LookupError, TypeError, AttributeError)      # another version's layout
    with contextlib.suppress(*odd):
        email = str(json_decode(values["antigravityAuthStatus"])["email"] or "")
    with contextlib.suppress(*odd):
        for raw in _proto_inside(values["antigravityUnifiedStateSync.oauthToken"])[1]:
            with contextlib.suppress(*odd):
                entry = proto_fields(raw)
                if entry[1][0] == b"oauthTokenInfoSentinelKey":
                    token = _token_info(entry[2][0])
    if not token:
        with contextlib.suppress(*odd):
            old = _proto_inside(values["jetskiStateSync.agentManagerInitState"])
            token = _token_info(old[6][0])
            email = email or old[2][0].decode("utf-8")
    for raw in values.values() if not token else ():    # no layout fits: look for the token's shape
        with contextlib.suppress(ValueError):
            raw += base64.b64decode(raw + b"=" * (-len(raw) % 4))
        match = re.search(rb"1//[0-9A-Za-z_-]{30,}", raw)
        token = match[0].decode() if match else token
    return {"refresh_token": token, "email": email} if token else {}


def _import_row(row: dict, provider: str) -> dict | None:
    """One account of another program's file, of whatever shape, as a row of ours; None for another
    vendor's, or a short-lived token alone."""
    def first(*values: Any) -> str:
        return next((v for v in values if isinstance(v, str) and v), "")
    token, email, proxy = object_of(row.get("token")), row.get("email"), row.get("proxy_url")
    provider = row.get("type", row.get("provider", provider))
    if provider == "gemini" and "type" in row:
        provider = "gemini-cli"
    out: dict = {"provider": provider}
    if first(email):
        out["email"] = email
    if row.get("enabled") is False or row.get("disabled") is True:
        out["enabled"] = False
    if first(proxy):
        out["proxy"] = proxy
    if provider not in ("antigravity", "gemini-cli"):
        key = "" if "type" in row else first(row.get("apiKey"))
        return {**out, "api_key": key} if key else None
    secret = first(row.get("refresh_token"), row.get("refreshToken"), token.get("refresh_token"))
    secret, _, rest = secret.partition("|")         # token|project|managed project
    project = next((p for p in (
        row.get("projectId"), row.get("project_id"), token.get("project_id"),
        row.get("managedProjectId"), object_of(row.get("subscription")).get("projectId"),
        *rest.split("|")) if isinstance(p, str) and p not in _NO_PROJECTS), "")
    if project:
        out["project"] = project.split(",")[0]
    if token.get("client_id") and token.get("client_secret"):
        out["client"] = {"client_id": str(token["client_id"]),
                         "client_secret": str(token["client_secret"])}
    return {**out, "refresh_token": secret} if secret else None


def _import_file(path: str) -> tuple[list[dict], int]:
    """(accounts of one file, known by its content and not by its name; how many were left out)."""
    try:
        with open(path, "rb") as handle:
            raw = handle.read(16 << 20)
        if raw.startswith(b"SQLite format 3"):
            found = antigravity_credentials(path)
            return ([{"provider": "antigravity", **found}] if found else []), 0
        content = json_decode(raw)
    except (OSError, ValueError):
        return [], 0
    provider = "gemini-cli" if os.path.basename(path) == "oauth_creds.json" else "antigravity"
    is_list = isinstance(content, list) or "accounts" in object_of(content)
    rows = objects_of(object_of(content).get("accounts", content)) if is_list else [
        object_of(content)]

    def is_ours(row: dict) -> bool:     # taken as it is, with everything its owner set
        return row.get("provider") in PROVIDERS and any(row.get(c) for c in CREDENTIALS) and (
            set(row) <= set(ACCOUNT_FIELDS))
    found = [row if is_ours(row) else _import_row(row, provider) for row in rows]
    return [row for row in found if row], found.count(None) if is_list else 0


def import_accounts(source: str, environ: Mapping[str, str]) -> tuple[list[dict], int]:
    """(rows for accounts.json out of another program's store, how many were left out): a name of
    IMPORT_SOURCES, a file or a folder.  Raises ConfigError naming what was looked for."""
    def fill(text: str) -> str:
        return os.path.expanduser(string.Template(text).safe_substitute(environ))
    places = [p for p in map(fill, IMPORT_SOURCES.get(source, (source,))) if not p.startswith("$")]
    for place in places:
        files = sorted(e.path for e in os.scandir(place)) if os.path.isdir(place) else [place]
        read = [_import_file(path) for path in files]
        found = [row for rows, _ in read for row in rows]
        if found:
            return found, sum(left for _, left in read)
    hint = ""
    if source == "gemini-cli" and os.path.exists(fill("~/.gemini/gemini-credentials.json")):
        hint = "; its sign-in is encrypted: run `accounts add --provider gemini-cli`"
    raise ConfigError(f"no account found in {' or '.join(places)}{hint}; sources are a file, "
                      f"a folder, or one of {', '.join(IMPORT_SOURCES)}")


def known_client(provider: Provider, environ: Mapping[str, str]) -> dict:
    """Cells for a provider whose OAuth client is only found in its installed program."""
    if provider.auth != "oauth" or oauth_clients(provider, environ):
        return {}
    found = discover_clients(provider, environ)
    return {"client_id": found[0][0], "client_secret": found[0][1]} if found else {}


def sort_imports(rows: list[dict], config: Config) -> tuple[list[dict], int]:
    """(rows that are new here, how many are known): by secret, also one that is only referred to,
    and by provider and e-mail address.  Rows of unknown providers are in neither."""
    def marks_of(row: Mapping) -> set:
        secret = next((str(row[c]) for c in CREDENTIALS if row.get(c)), "")
        with contextlib.suppress(ConfigError):      # it cannot be read now: compared as it stands
            secret = resolve_secret(secret) if secret.startswith(("env:", "file:")) else secret
        return {secret, (row["provider"], row["email"])} if row.get("email") else {secret}
    new, known, seen = [], 0, set().union(*map(marks_of, config.accounts))
    for row in rows:
        marks = marks_of(row)
        if marks & seen:
            known += 1
        elif row["provider"] in config.providers:
            new.append(row)
        seen |= marks
    return new, known


# The keeper

class AccountsFile:
    """The accounts file under a running server: valid edits go to `apply`, an invalid one leaves
    the old settings in force; rotated tokens are stored, again and again where that fails."""

    def __init__(self, path: str, flags: Mapping[str, Any], log: Log,
                 apply: Callable[[Config], None]):
        self.path, self.flags, self.log, self.apply = path, flags, log, apply
        self._lock = threading.Lock()                       # guards _unsaved
        self._unsaved: dict[str, tuple[set, str]] = {}      # account -> (those before, new)
        self._seen, self._told = self._signature(), ""

    def keep_token(self, account: Account, old: str, new: str) -> None:
        """Stores a rotated refresh token before it is used, or as soon as that works."""
        with self._lock:
            before = self._unsaved.get(account.name, (set(), ""))[0]
            self._unsaved[account.name] = before | {old}, new
        self.save_tokens("is kept in memory until it can be stored", account.name)

    def save_tokens(self, otherwise: str = "", of: str = "") -> None:
        """Stores what is not stored yet; `otherwise` says what becomes of it where that fails, for
        one account or for all."""
        with self._lock:
            for name, (old, new) in list(self._unsaved.items()) if self.path else ():
                try:
                    save_rotated_token(self.path, name.partition("@")[0], old, new)
                    del self._unsaved[name]
                except (OSError, ConfigError) as err:
                    if otherwise and of in ("", name):
                        self.log.line("%s: its new refresh token %s: %s", name, otherwise,
                                      cause(err))

    def watch(self) -> None:
        """Once a second: what could not be stored, and what was edited."""
        self.save_tokens()
        signature = self._signature()
        if signature == self._seen:
            return
        try:
            stored = read_accounts_file(self.path)
            if not stored:
                raise ConfigError(f"{self.path} is gone or empty")
            config = load_config(self.path, self.flags, os.environ, stored)
        except ConfigError as err:      # looked at again: perhaps it is unreadable for a moment
            if self._told != str(err):
                self._told = str(err)
                self.log.line("accounts file not taken over, the old settings stay: %s", err)
            return
        self._seen, self._told = signature, ""
        self.apply(config)
        keep_last_good(self.path)
        self.log.line("accounts file taken over: %s accounts", len(config.accounts))

    def _signature(self) -> tuple:
        with contextlib.suppress(OSError):      # it is gone
            stat = os.stat(self.path)
            return stat.st_mtime_ns, stat.st_size, stat.st_ino
        return ()


LONG_AGO = float("-inf")        # on a clock that began when the machine did


class Keeper:
    """Does ahead of need what requests would wait for: tokens, projects, quota readings, edits of
    the accounts file.  Two threads, so that a slow upstream does not hold up an edit."""

    def __init__(self, pool: AccountPool, tokens: Tokens, reload: Callable[[], None],
                 log: Log, touch: Callable[[Candidate], None], is_first: bool = True):
        self.is_first = is_first        # of several workers one asks for all of them
        self.pool, self.tokens, self.reload, self.log, self.touch = pool, tokens, reload, log, touch
        self.clock, self.connections = tokens.clock, tokens.connections
        self._stop = threading.Event()
        self._read_at: dict[tuple, float] = {}      # (account, pool) -> monotonic, of a reading
        self._renewed_at: dict[str, float] = {}
        self._jitter: dict[tuple, float] = {}
        self._touched: dict[tuple, float] = {}
        self._threads = [threading.Thread(target=self._loop, args=(job,), daemon=True, name=name)
                         for job, name in ((self.reload, "watcher"), (self.tick, "keeper"))]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()

    def _loop(self, job: Callable[[], None]) -> None:
        while not self._stop.wait(1):
            try:
                job()
            except Exception as err:        # a thread's top: the next second is another try
                self.log.line("upkeep: %s", short_trace(err))

    def tick(self) -> None:
        """Whatever is due now, one account after the other."""
        now = self.clock.monotonic()
        for account in list(self.pool.accounts):
            if self._stop.is_set():
                return
            if self.pool.is_stopped(account):
                continue            # no call at all before its owner acted
            for provider in account.providers if account.provider.envelope else ():
                key = (account.name, provider.id)
                # others read only after a refusal of their own
                read_at = self._read_at.get(key, LONG_AGO if self.is_first else float("inf"))
                if now >= read_at + self.interval(account, provider):
                    self.read(account, provider)
            if account.provider.catalogue == "as asked" and self.is_first:
                self.list_models(account)
            if account.provider.quota and self.is_first:
                self.read_key(account)
            self._renew(account)

    def _renew(self, account: Account) -> None:
        """A token of an account in use is renewed before requests have to wait for it, those that
        began together not together."""
        now, at = self.clock.now(), self.clock.monotonic()
        ahead_s = TOKEN_REFRESH_BEFORE_S * self._jitter.setdefault(("token", account.name),
                                                                   jitter(1.5))
        left_s = account.token_expires_at - now
        if (now - account.used_at >= 3600 or not 0 < left_s < ahead_s
                or at - self._renewed_at.get(account.name, LONG_AGO) <= 60):
            return
        self._renewed_at[account.name] = at
        try:
            self.tokens.access(account, life_s=ahead_s)
        except ProxyError as err:
            self._blame(account, err)

    def list_models(self, account: Account) -> None:
        """Once a day what an upstream lists, for clients that want to see names; who comes while
        it is asked waits for it."""
        key = account.name, account.provider.id
        facts, now = self.pool.facts(key), self.clock.now()
        if facts and abs(now - facts.at) < FACTS_LAST_S or not self._may_list(key):
            return
        with contextlib.suppress(ProxyError):       # of another's asking, which has said so
            self.tokens.flights.fly(("list", *key), lambda: self._list(account, key))

    def _may_list(self, key: tuple) -> bool:
        return self.clock.monotonic() - self._read_at.get(key, LONG_AGO) >= 3600 or (
            self.tokens.flights.is_under_way(("list", *key)))

    def _list(self, account: Account, key: tuple) -> None:
        now, at = self.clock.now(), self.clock.monotonic()
        if at - self._read_at.get(key, LONG_AGO) < 3600:
            return
        self._read_at[key] = at
        try:
            self.pool.note_facts(key, Facts("", "", "", check_key(account, self.connections), now))
        except (ProxyError, ConfigError) as err:        # what is asked for will tell
            self.log.line("%s: its models could not be listed: %s", account.label, err)

    def read_key(self, account: Account) -> None:
        """What is left to a key, now and then."""
        key, now = (account.name, account.provider.id), self.clock.now()
        due_at = self._read_at.get(("quota", *key), LONG_AGO) + self.interval(account,
                                                                            account.provider)
        if self.clock.monotonic() < due_at:
            return
        self._read_at[("quota", *key)] = self.clock.monotonic()
        try:
            self.pool.note_windows(key, read_key_quota(account, self.connections, now))
        except (ProxyError, ConfigError) as err:        # requests go on without it
            self.log.line("%s: %s", account.label, err)

    def list_missing(self) -> bool:
        """Reads lists that were never asked for, or could not be had, all at once, and waits for
        them a little; whether any list is known then, perhaps by another's asking."""
        listing = [a for a in self.pool.accounts if a.provider.catalogue == "as asked"]
        asked = [a for a in listing if not self.pool.facts((a.name, a.provider.id))
                 and self._may_list((a.name, a.provider.id)) and not self.pool.is_stopped(a)]
        threads = [threading.Thread(target=self.list_models, args=(a,), daemon=True, name="lister")
                   for a in asked]
        deadline = time.monotonic() + LIST_WAIT_S
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return any(self.pool.facts((a.name, a.provider.id)) for a in listing)

    def interval(self, account: Account, provider: Provider) -> float:
        """Seconds between two readings now, with jitter so that accounts do not come in step."""
        key = (account.name, provider.id)
        is_active = self.clock.now() - account.used_at < 3600
        base = self.pool.settings["quota_poll_s"] if is_active else QUOTA_IDLE_POLL_S
        facts = self.pool.facts(key)
        if facts and facts.is_absent(self.clock.now()):
            base = ABSENT_LASTS_S
        elif self.pool.has_stated_limit(key):
            base = min(base, RECHECK_S)
        return base * self._jitter.setdefault(key, jitter(1.0))

    def after_quota(self, account: Account, provider: Provider) -> None:
        """A quota refusal is looked into by a reading, five seconds later."""
        key = (account.name, provider.id)
        self._read_at[key] = self.clock.monotonic() + 5 - self.interval(account, provider)

    def read(self, account: Account, provider: Provider) -> ProxyError | None:
        """Reads facts where they are due, then quota; the failure, where there is one."""
        key = (account.name, provider.id)
        self._read_at[key] = self.clock.monotonic() if self.is_first else float("inf")
        token = ""
        for is_last in (False, True):
            try:
                token = self.tokens.access(account, refused=token)
                facts = pool_facts(self.pool, self.tokens, account, provider, token)
                if facts.absent:
                    return None
                windows, models = read_quota(account, provider, token, account.project
                                             or facts.project, self.tokens)
                break
            except ProxyError as err:
                if is_last or err.kind != "auth_expired":
                    self._blame(account, err)
                    return err
        if models and models != facts.models:
            self.pool.note_facts(key, facts._replace(models=models))
        self.pool.note_windows(key, windows)
        if self.pool.settings.get("auto_refresh") and self.is_first:
            self._start_windows(account, provider, windows)
        return None

    def _blame(self, account: Account, error: ProxyError) -> None:
        if error.rule.rest == "stop":
            self.pool.stop(account, error)
        self.log.line("%s: %s", account.label, error)

    def _start_windows(self, account: Account, provider: Provider, windows: list[Window]) -> None:
        """A small request for each group whose 5 h window has not begun: so it ends earlier."""
        now = self.clock.monotonic()
        for window in windows:
            key = (account.name, provider.id, window.scope)
            model = {"gemini": "gemini-3-flash", "3p": "claude-sonnet-4-6"}.get(window.scope)
            if (model and window.window == "5h" and window.fraction == 1.0
                    and now - self._touched.get(key, LONG_AGO) > FIVE_HOURS_S):
                self._touched[key] = now
                self.touch(Candidate(account, provider, MODELS[model], model))


# ── 15. Upstream call ─────────────────────────────────────────────────────
# One call to one host: the table of dialects, the pipe that turns upstream
# bytes into downstream bytes, and what an answer that is not one means.
# Knows no account and not the client's socket: whoever calls hands in `wait`.


class Count(NamedTuple):
    """How an upstream counts a request's tokens."""
    path: Callable[[Target], str]               # "" where it cannot
    wrap: Callable[[Any, Target], Any]          # the generating call's body -> that of the count
    member: str                                 # of its answer


class Dialect(NamedTuple):
    """The functions of a wire language; None on the side it does not play.  All are fed and
    answer, none waits.  To add a dialect: a room with these functions, and a row here."""
    parse_request: Any = None       # (body, headers, is_count=, raw=, query=, path=) -> Request
    answer_state: Any = None        # (Request, epoch seconds) -> state for the following
    render_delta: Any = None        # (state, delta) -> ASCII text
    render_reply: Any = None        # (state, Reply) -> dict
    render_error: Any = None        # (ProxyError, request id) -> dict
    keep_alive: Any = None          # (state, is_beat) -> ASCII text
    scale: Any = None               # (tokens, client's window, model's) -> tokens to show
    render_request: Any = None      # (Request, Target, signatures, repairs) -> Rendered
    path: Any = None                # (Target, Request) -> path and query of the generating call
    parser: Any = None              # (Target) -> function(event text) -> loose pieces
    can_search: Any = None          # (Model, Provider, SearchWish) -> whether it looks at the web
    relay_request: Any = None       # (Request, Target, repairs) -> Rendered: same on both sides
    relay: Any = None               # (state) -> machine that takes whole events
    plain: Any = None               # (parser) -> PlainEvents
    count: Count | None = None      # how an upstream of this language counts tokens
    recall: Any = None              # (body, kept) -> (body with what came before, what is known)
    keep: Any = None                # (state, Request, is relayed) -> (id, row to keep) or None
    render_count: Any = None        # (tokens) -> the answer to a client that has them counted
    call_prefix: str = "call_"      # of a call's id that is made here
    begins_early: bool = False      # a held stream opens with its beginning, not just a keep-alive
    fetches: bool = False           # upstreams of this language read URLs of media
    sounds: bool = False            # ... and take audio
    is_error: Callable[[dict], bool] = lambda body: isinstance(     # told in this language
        object_of(body.get("error")).get("message"), str)


def anthropic_count_body(body: Any, target: Target) -> Any:
    """The body of a count: it takes no limits, and no stream."""
    return body if isinstance(body, bytes) else {
        k: v for k, v in body.items() if k not in ("max_tokens", "stream", "stop_sequences",
                                                   "temperature", "top_p", "top_k", "metadata")}


def gemini_count_body(body: Any, target: Target) -> Any:
    if isinstance(body, bytes):         # as the client gave it
        inner = json.loads(body)
        return inner if "contents" in inner and len(inner) == 1 else {"generateContentRequest": {
            "model": "models/" + target.upstream_id, **(
                object_of(inner.get("generateContentRequest")) or inner)}}
    return {"generateContentRequest": {"model": "models/" + target.upstream_id, **body}}


DIALECTS = {
    "anthropic": Dialect(
        anthropic_parse_request, lambda request, now: AnthropicAnswer(request.model),
        anthropic_render_delta, anthropic_render_reply, anthropic_render_error,
        anthropic_keep_alive, scaled_tokens, anthropic_render_request, anthropic_path,
        lambda target: anthropic_parse_event,
        lambda model, provider, wish: "no_search" not in provider.quirks,
        anthropic_relay_request, AnthropicRelay, lambda parser: AnthropicPlain(),
        Count(lambda target: "" if "no_count" in target.provider.quirks
              else "/v1/messages/count_tokens", anthropic_count_body, "input_tokens"),
        render_count=lambda tokens: {"input_tokens": tokens}, call_prefix="toolu_",
        begins_early=True, fetches=True,
        is_error=lambda body: body.get("type") == "error" and isinstance(
            object_of(body.get("error")).get("type"), str)),
    "chat": Dialect(
        chat_parse_request, chat_answer, chat_render_delta, chat_render_reply, openai_render_error,
        comment_keep_alive, None, chat_render_request, lambda target, request: "/chat/completions",
        ChatParser, None, chat_relay_request, ChatRelay, ChatPlain, fetches=True, sounds=True),
    "completions": Dialect(
        completion_parse_request, chat_answer, chat_render_delta, chat_render_reply,
        openai_render_error, comment_keep_alive),
    "responses": Dialect(
        responses_parse_request, responses_answer, responses_render_delta, responses_render_reply,
        openai_render_error, comment_keep_alive, None, responses_render_request,
        lambda target, request: "/responses", ResponsesParser, lambda model, provider, wish: (
            wish.tool == "web_search" and "no_search" not in provider.quirks),
        responses_relay_request, ResponsesRelay, fetches=True,
        recall=responses_recall, keep=responses_keep, render_count=lambda tokens: {
            "object": "response.input_tokens", "input_tokens": tokens}),
    "gemini": Dialect(
        gemini_parse_request, lambda request, now: GeminiAnswer(
            request.model, request.is_streaming and request.ext.get("is_array", False)),
        gemini_render_delta, gemini_render_reply, gemini_render_error,
        lambda state, is_beat: "\n" if state.is_array else "\n\n",    # comments break its clients
        None, gemini_render_request, gemini_path,
        lambda target: gemini_parse_event, can_search, gemini_relay_request, GeminiRelay,
        lambda parser: GeminiPlain(),
        # Cloud Code's count leaves out system and tools: our own guess is better there
        Count(lambda target: "" if target.provider.envelope
              else gemini_model_path(target) + ":countTokens", gemini_count_body, "totalTokens"),
        render_count=lambda tokens: {"totalTokens": tokens, "promptTokensDetails": [
            {"modality": "TEXT", "tokenCount": tokens}]}, sounds=True),
}


def rendered_for(request: Request, target: Target, signatures: Any,
                 repairs: frozenset) -> Rendered:
    """The request in the upstream's language: as it came, where that is the client's own."""
    dialect = DIALECTS[target.provider.dialect]
    if request.is_native_to(target.provider):
        return dialect.relay_request(request, target, repairs)
    return dialect.render_request(request, target, signatures, repairs)


_FETCHED_BY_GEMINI = re.compile(r"(gs://|https://generativelanguage\.googleapis\.com/|https://"
                                r"(www\.)?(youtube\.com|youtu\.be)/)")


def unsupported(request: Request, provider: Provider, model: Model) -> str:
    """What of a request an upstream could not take, as a sentence that names it; "" where it takes
    all."""
    dialect = DIALECTS[provider.dialect]
    for block in request.media:
        kind = block.media_type.partition("/")[0]
        if kind == "image" and "no_images" in provider.quirks:
            return f"{block.path}: {model.id} takes no images"
        is_deaf = not dialect.sounds or (       # Cloud Code serves these, which hear nothing
            provider.dialect == "gemini" and model.family in ("claude", "gpt-oss"))
        if kind in ("audio", "video") and is_deaf or (
                kind == "video" and provider.dialect != "gemini"):
            return f"{block.path}: {model.id} takes no {kind}"
        if block.url and provider.dialect == "chat" and kind != "image":
            return f"{block.path}: {model.id} takes {kind} as data only, not by its URL"
        if block.url and not (dialect.fetches and not block.url.startswith("gs:") or (
                provider.dialect == "gemini" and not provider.envelope
                and _FETCHED_BY_GEMINI.match(block.url))):
            return (f"{block.path}: {model.id} is served by an upstream that fetches no URLs, and "
                    "neither does this proxy; send the data as base64")
    return ""


# What an answer means: first row whose parts all match.  Statuses, a reason or quota id, a text.
# Texts are matched loosely: Google rewords them.  Sources: captures of 2026, Google's API docs.
class Meaning(NamedTuple):
    statuses: tuple
    reason: str             # regular expression on ErrorInfo reasons and quota ids, upper-case
    text: str               # regular expression on the message
    kind: str


_REFUSED_PARAMETER = (      # OpenAI's, Mistral's, Groq's and vLLM's ways to name a parameter
    r"(?:unsupported|unknown|unrecognized|unexpected)[\w ]{0,40}?(?:parameter|argument|field|"
    r"value|property)[\w ]{0,40}:? [`'\"]?([a-z_]+(?:\.[a-z_]+)*)"
    r"|(?:parameter|property|field|argument) [`'\"]([a-z_]+)[`'\"] is (?:not supported|unsupported)"
    r"|[`']([a-z_]+)[`'](?: is| does)? (?:not supported|unsupported|not allowed|does not "
    r"support)|body\.([a-z_]+(?:\.[a-z_]+)*): extra inputs are not permitted")
MEANINGS = tuple(row._replace(text=re.compile(row.text, re.I), reason=re.compile(row.reason))
                 for row in (
    Meaning((), "CONTEXT_LENGTH_EXCEEDED", "", "too_long"),
    Meaning((), "", r"prompt is too long|input token count.*exceeds|request_too_large"
            r"|maximum context length|exceeds? the (model's )?(maximum )?context", "too_long"),
    Meaning((413,), "", "", "too_long"),
    Meaning((400,), "", r"thought[ _]?signature|invalid `signature`|signature: field required"
            r"|expected `thinking`|must start with a thinking block|cannot be modified"
            r"|bound to a different",
            "signature"),
    Meaning((400,), "", r"function response parts is equal|function call turn comes immediately"
            r"|tool_use_id|`tool_use` ids were found", "pairing"),
    Meaning((400,), "INVALID_ENCRYPTED_CONTENT", "", "signature"),
    Meaning((400,), "", r"encrypted.content.{1,80}(could not be|cannot be|not valid|invalid)",
            "signature"),
    Meaning((400,), "NOT_FOUND_ERROR", "", "model_missing"),
    Meaning((400,), "OVERLOADED_ERROR", "", "capacity"),
    Meaning((400,), "PERMISSION_ERROR", "", "denied"),
    Meaning((400,), "", r"credit balance is too low", "quota"),
    Meaning((400, 404), "PREVIOUS_RESPONSE_NOT_FOUND", "", "form"),
    Meaning((404,), "", r"previous.response|\bresponse with id", "form"),
    Meaning((400, 422), "UNSUPPORTED_PARAMETER|UNKNOWN_PARAMETER|UNSUPPORTED_VALUE"
            "|EXTRA_FORBIDDEN", "", "form"),
    Meaning((400, 422), "", _REFUSED_PARAMETER, "form"),
    Meaning((400,), "", r"max_tokens: \d+ > \d+|supports at most \d+|invalid schema for|json_schema"
            r"|response_format", "form"),
    Meaning((400,), "", r"budget_tokens|thinking.?budget|thinking.?level|anthropic-beta|prefill"
            r"|extra inputs are not permitted|input_schema|function_declarations|proto field"
            r"|unknown name|must end with a user|\brole\b.{1,30}not supported|inline.?data|\bmime"
            r"|\bimage\b", "form"),
    # business codes of Z.AI's error bodies, mostly under 429
    Meaning((), "CODE_100[0-4]", "", "revoked"),
    Meaning((), "CODE_1261", "", "too_long"),
    Meaning((), "CODE_(1113|1304|1308|1309|1310)", "", "quota"),
    Meaning((), "CODE_(1302|1303|1305)", "", "rate"),
    Meaning((), "CODE_1312", "", "capacity"),
    Meaning((), "CODE_(1311|1211)", "", "model_missing"),
    Meaning((), "CODE_1313", "", "disabled"),
    Meaning((400, 401, 403), "API_KEY_INVALID|API_KEY_EXPIRED|INVALID_API_KEY", "", "revoked"),
    Meaning((), "UNSUPPORTED_COUNTRY", "", "region"),
    Meaning((), "SERVER_IS_OVERLOADED", "", "capacity"),
    Meaning((429, 402), "CREDIT_BALANCE|INSUFFICIENT_QUOTA|USAGE_NOT_INCLUDED", "", "quota"),
    Meaning((429,), "SLOW_DOWN", "", "rate"),
    Meaning((400, 404), "MODEL_NOT_FOUND", "", "model_missing"),
    Meaning((), "", r"version of antigravity is no longer supported|not available on this version",
            "version"),
    Meaning((403,), "VALIDATION_REQUIRED", "", "validation"),
    Meaning((403,), "", r"verify your account", "validation"),
    Meaning((403,), "", r"violation of terms of service|submit an appeal|reported as leaked",
            "disabled"),
    Meaning((403,), "SUBSCRIPTION_REQUIRED|SERVICE_DISABLED|IAM_PERMISSION_DENIED", "", "project"),
    Meaning((), "UNSUPPORTED_CLIENT", "", "absent"),
    Meaning((), "", r"no longer supported for gemini code assist", "absent"),
    Meaning((403,), "", r"valid license|lack a gemini code assist|generatechat. denied|named user",
            "project"),
    Meaning((403,), "ACCESS_TOKEN_SCOPE_INSUFFICIENT", "", "revoked"),
    Meaning((400, 403), "UNSUPPORTED_LOCATION|RESTRICTED_NETWORK", "", "region"),
    Meaning((400, 403), "", r"location is not supported", "region"),
    Meaning((403,), "", r"model name is invalid|don't have access to this model", "model_missing"),
    Meaning((401,), "AUTHENTICATION_ERROR", "", "revoked"),
    Meaning((401,), "", "", "auth_expired"),
    Meaning((403,), "PERMISSION_ERROR", "", "denied"),
    Meaning((403,), "PERMISSION_DENIED", "", "project"),       # Google's word for all of it
    Meaning((403,), "", "", "denied"),
    Meaning((404,), "", "", "model_missing"),
    Meaning((429, 503, 529), "MODEL_CAPACITY_EXHAUSTED", "", "capacity"),
    Meaning((503, 529), "", r"no capacity|overloaded", "capacity"),
    Meaning((400, 429), "", r"overloaded", "capacity"),
    Meaning((529,), "", "", "capacity"),
    Meaning((402,), "", "", "quota"),
    Meaning((429,), "", r"limit: 0\b", "entitlement"),
    Meaning((429,), "QUOTA_EXHAUSTED|PERDAY|DAILY|INSUFFICIENT_|USAGE_LIMIT", "", "quota"),
    Meaning((429,), "", r"exhausted your capacity|individual quota reached|quota will reset",
            "quota"),
    Meaning((429,), "RATE_LIMIT_EXCEEDED|RATELIMITEXCEEDED|PERMINUTE", "", "rate"),
    Meaning((429,), "", r"retry in|try again", "rate"),
    Meaning((408, 504), "", "", "stall"),
    Meaning((499, 500, 502, 503), "", "", "server"),
    Meaning((400, 405, 409, 415, 422), "", "", "bad_request"),
))
_TOKEN_COUNTS = re.compile(r"(\d{4,})\D{1,80}?(\d{4,})")


HINTS = {       # what the owner is told beside the upstream's own words
    "soft_429": " (a 429 without details: a burst limit, or the request's content is refused)",
    "auth_expired": " (a fresh token was refused too; run `accounts verify`, else `accounts add`)",
    "version": " (raise the version in the provider's `user_agent`)",
    "validation": " (do so on that page, then run `accounts verify`)",
    "disabled": " (nothing more is sent for it; after an appeal run `accounts verify`)",
    "project": " (set `project` of the account, or run `accounts verify`)",
}


class Repair(NamedTuple):
    """What a refused request asks for: changes in order, each tried once; `{}` is what the text's
    group names.  A renderer knows its own."""
    text: Any               # regular expression on the upstream's message
    translated: tuple       # of a request that was rendered here
    relayed: tuple          # of one that went through


REPAIRS = tuple(row._replace(text=re.compile(row.text, re.I)) for row in (
    Repair(r"thought[ _]?signature", ("signatures", "calls_as_text"), ("signatures",)),
    Repair(r"expected `thinking`|must start with a thinking block", ("signatures",),
           ("no_thinking",)),
    Repair(r"invalid `signature`|signature: field required|bound to a different|cannot be modified",
           ("signatures",), ("thinking",)),
    Repair(r"encrypted.content", ("signatures",), ("reasoning",)),
    Repair(r"function response parts|function call turn comes|tool_use_id|`tool_use` ids",
           ("calls_as_text",), ("pairs",)),
    Repair(r"budget_tokens|thinking.?budget|thinking.?level", ("no_budget",), ()),
    Repair(r"(?:function_declarations\[|tools\.)(\d+)", ("core_schemas", "bare_schema {}"), ()),
    Repair(r"input_schema|function_declarations|proto field|unknown name", (
        "core_schemas", "bare_schemas"), ()),
    Repair(r"unexpected value\(s\) `([\w-]+)`.*anthropic-beta", ("drop {}",), ("drop {}",)),
    Repair(r"(?:body\.)?\b([a-z_][\w.]*): extra inputs are not permitted", ("drop {}",),
           ("drop {}",)),
    Repair(r"max_tokens: \d+ > (\d+)|supports at most (\d+)", ("limit {}",), ()),
    Repair(r"previous.response|\bresponse with id", (), ("expand",)),
    Repair(r"invalid schema for", ("core_schemas", "bare_schemas"), ()),
    Repair(r"(output_config\.effort)", ("unset {}",), ()),
    Repair(r"output_config\.format|output_format|json_schema|response_format",
           ("schema_as_text",), ()),
    Repair(r"unsupported value: [`'\"]([a-z_.]+)", ("unset {}",), ("unset {}",)),
    Repair(_REFUSED_PARAMETER, ("drop {}",), ("drop {}",)),
    Repair(r"prefill|must end with a user", (), ("last_turn",)),
    Repair(r"\brole\b.{1,30}not supported", (), ("system_role",)),
    Repair(r"inline.?data|\bmime|\bimage\b", ("old_media",), ()),
))


NEVER_DROPPED = frozenset((     # a request without them is another one: better refused
    "model", "messages", "input", "contents", "prompt", "system", "instructions", "stream", "tools",
    "content", "role", "type", "name", "functions"))
NOT_FOR_OTHERS = frozenset((    # refused for a value or in company: the next request may have them
    "tool_choice", "response_format", "text", "stop", "user", "metadata", "thinking", "reasoning"))


def is_lasting(repair: str) -> bool:
    """Whether every request to this upstream will need it; what one client's own fields caused is
    nothing that others should lose."""
    if repair.startswith("drop ") and repair[5:] in NOT_FOR_OTHERS:
        return False
    return repair in ("last_turn", "system_role", "no_budget", "schema_as_text") or (
        repair.startswith("limit ")) or repair.startswith("drop ") and (
        repair[5:].isidentifier() or bool(beta_fields(repair[5:])))


def next_repair(message: str, is_relayed: bool, done: Iterable[str]) -> str:
    """The next repair that a refusal asks for, "" where none is left."""
    for row in REPAIRS:
        match = row.text.search(message)
        for step in (row.relayed if is_relayed else row.translated) if match else ():
            named = next(filter(None, match.groups()), "")
            is_whole = step in ("drop {}", "unset {}") and named in NEVER_DROPPED
            if step.format(named) not in done and not is_whole:
                return step.format(named)
    return ""


_TYPE_STATUS = {        # what an event in a stream calls its error -> the status it would have had
    **{rule.type: rule.status for rule in reversed(tuple(ERRORS.values()))},
    **dict.fromkeys(("rate_limit_exceeded", "slow_down", "insufficient_quota",
                     "usage_limit_reached"), 429),
    **dict.fromkeys(("server_is_overloaded", "service_unavailable_error"), 503),
    **dict.fromkeys(("context_length_exceeded", "invalid_prompt"), 400), "server_error": 500,
    "invalid_api_key": 401, "model_not_found": 404}


def read_meaning(status: int, headers: Mapping[str, str], raw: Any, now: float,
                 counted: Callable[[], int], limit: int) -> ProxyError:
    """The error an upstream's answer means.  `counted` and `limit` are our own input tokens and the
    model's window, for upstreams that say `too long` without numbers."""
    facts = error_facts(raw, headers, now)
    facts = facts._replace(message=facts.message[:MAX_ERROR_LETTERS])
    if status == 200:           # an event in a stream: Google tells a code, Anthropic a type
        word = next((r for r in facts.reasons if r.lower() in _TYPE_STATUS), "")
        status = facts.code or _TYPE_STATUS.get(word.lower(), 500)
    reasons = " ".join(sorted(facts.reasons))
    kind = next((row.kind for row in MEANINGS if (not row.statuses or status in row.statuses)
                 and (not row.reason.pattern or row.reason.search(reasons))
                 and (not row.text.pattern or row.text.search(facts.message))), "")
    if not kind:
        kind = "server" if status >= 500 else "bad_request"
        if status == 429:
            kind = "soft_429" if facts.delay_s is None else "rate"
    if kind == "too_long":
        # Claude Code compacts on exactly this wording with both numbers
        match = _TOKEN_COUNTS.search(facts.message)
        used, most = (int(match[1]), int(match[2])) if match else (counted(), limit)
        return ProxyError(kind,
                          f"prompt is too long: {max(used, most + 1)} tokens > {most} maximum")
    message = redact(facts.message) or f"the upstream answered {status}"
    message += (f" {facts.link}" if facts.link else "") + HINTS.get(kind, "")
    delay = facts.delay_s
    # RetryInfo is short there; the day ends at 08:00 UTC
    if kind == "quota" and "PERDAY" in reasons:
        delay = (8 * 3600 - now) % 86400
    return ProxyError(kind, message, delay_s=delay)


_CLIENTS_WORDS = re.compile(r"prompt is too long: \d+ tokens > \d+|exceed context limit")


def relayed_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """What a client of the same language is to see of an upstream's head: limits are passed on,
    never made up."""
    told = {name: value for name, value in headers.items() if re.fullmatch(r"[a-z0-9-]+", name)
            and not re.search(r"-organi[sz]ation|-project", name)     # whose account it is
            and (name.startswith(("anthropic-", "x-ratelimit-", "openai-", "x-codex-"))
                 or name in ("request-id", "x-request-id", "x-should-retry"))}
    return {} if holds_secret("\n".join(told.values())) else told


def told_verbatim(error: ProxyError, status: int, headers: Mapping[str, str], raw: Any,
                  is_error: Callable[[dict], bool]) -> ProxyError:
    """`error` with the upstream's own answer, where it is one that the client can read: Claude Code
    repairs itself by the vendor's wording."""
    error.headers = relayed_headers(headers)
    if not isinstance(raw, bytes) or not 400 <= status < 500:
        return error
    with contextlib.suppress(ValueError):       # no JSON: ours is better
        body = object_of(json_decode(raw))
        told = object_of(body.get("error"))
        is_exact = (body.get("type") != "error" or error.kind != "too_long" or status == 413
                    or _CLIENTS_WORDS.search(str(told.get("message"))))
        # its own spelling, and that of its escapes undone
        if is_error(body) and is_exact and not holds_secret(
                raw.decode("utf-8") + json.dumps(body, ensure_ascii=False)):
            error.verbatim = status, raw, error.headers
    return error


def small_call_error(status: int, headers: Mapping[str, str], raw: bytes,
                     now: float) -> ProxyError:
    """What the error answer of a token, project or quota call means."""
    return read_meaning(status, headers, raw, now, lambda: 0, 0)


# Pipe

_TOO_OLD = "version of Antigravity is no longer supported"      # told as model text


class Pipe:
    """Upstream body bytes in, downstream bytes out: splitter, parser, Assembler, gate, renderer.
    Feeds never raise: what went wrong stands in `fault`, after the output that came before it."""

    def __init__(self, parse_event: Callable[[str], list], shape: AnswerShape, request: Request,
                 render: Callable[[Any], str], understand: Callable[[Any], ProxyError],
                 plain: PlainEvents | None = None):
        self.splitter, self.assembler, self.plain = SseSplitter(), Assembler(shape), plain
        self._usages: list[str] = []    # of plain events: read when somebody asks
        self.parse_event, self.render, self.understand = parse_event, render, understand
        self.gate = None
        if request.stop_sequences or shape.prefill or shape.pick_json or request.max_tokens:
            self.gate = TextGate(request.stop_sequences, request.max_tokens, shape.prefill,
                                 shape.pick_json, self.assembler.known_usage)
        self.fault: ProxyError | None = None
        self.has_said = False           # some text was rendered
        self.is_done = False            # the answer is over before the upstream's end

    @property
    def has_content(self) -> bool:
        """Whether what was told cannot be taken back; Gemini's clients get calls whole."""
        return self.assembler.begun and self.has_said

    leaves_whole = False        # where it ends an answer, the upstream has more to say

    def usage(self) -> Usage:
        self._read_usages()
        return self.assembler.known_usage()

    @property
    def is_metered(self) -> bool:
        """Whether the upstream itself told the input's tokens."""
        self._read_usages()
        return "input" in self.assembler.counts

    def _read_usages(self) -> None:
        if self._usages:
            usages, self._usages = self._usages, []
            self.assembler.counts.update(self.plain.counts(usages))

    def feed(self, data: bytes) -> bytes:
        return self._guarded(self._events, data)

    def end(self) -> bytes:
        """The upstream's end, properly framed."""
        return self._guarded(self._end)

    def _guarded(self, work: Callable[..., None], *values: Any) -> bytes:
        out: list[str] = []
        try:
            work(out, *values)
        except UpstreamFault as err:
            self.fault = self.understand(err.body)
        except ProxyError as err:
            self.fault = err.with_traceback(None)       # whose frames would hold this Pipe
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as err:
            self.fault = ProxyError("cut", f"the upstream's answer is damaged: {err}")
        return "".join(out).encode("utf-8")

    def _events(self, out: list[str], data: bytes) -> None:
        events, plain = self.splitter.feed(data), self.plain
        rows: list[tuple] = []          # plain events of one kind, not told yet
        kind = None
        for at, event in enumerate(events):
            row = plain(event) if plain else None
            if row is not None and row[0] is kind:
                rows.append(row)
                continue
            if rows:
                self._run(rows, events[at - len(rows):at], out)
                rows, kind = [], None
            if row is not None and self._copies(row, event):
                rows, kind = [row], row[0]
            else:
                self._event(event, out)
        if rows:
            self._run(rows, events[-len(rows):], out)

    def _copies(self, row: tuple, event: str) -> bool:
        """Whether the text of a plain event is only copied, and of those like it that follow."""
        kind, raw, _ = row
        if self.is_done or not self.assembler.begun and _TOO_OLD in event or (
                kind is Kind.TEXT and self.gate and not self.gate.is_open):
            return False
        return self.assembler.copies(kind, raw, self.plain.opens)

    def _run(self, rows: list[tuple], events: list[str], out: list[str]) -> None:
        """Plain events as one Run, their texts copied: 2.5 us an event in all against 11.3."""
        kind, raw = rows[0][0], [row[1] for row in rows]
        text = told_by("".join(raw))
        if kind is Kind.TEXT and self.gate and not self.gate.passes(text):
            for event in events:
                self._event(event, out)
            return
        if not text.isascii():
            raw = ascii_insides(raw)
        if not self.assembler.begun and rows[0][2]:
            self.assembler.counts.update(self.plain.counts([rows[0][2]]))   # the beginning's
        self._usages += [row[2] for row in rows if row[2]]
        if len(self._usages) > MAX_UNREAD_USAGES:
            self._read_usages()
        deltas = self.assembler.opening(kind)
        if deltas:
            self._send(deltas, out)
        told = self.render(self.assembler.run(raw, text))
        out.append(told)
        self.has_said = self.has_said or bool(told)

    def _end(self, out: list[str]) -> None:
        for event in self.splitter.end():
            self._event(event, out)
        if not self.is_done:
            self._read_usages()
            self._send(self.assembler.end(), out)

    def _event(self, event: str, out: list[str]) -> None:
        if self.is_done:
            return
        if not self.assembler.begun and _TOO_OLD in event:
            raise UpstreamFault({"error": {"code": 503, "message": "This " + _TOO_OLD}})
        try:
            pieces = self.parse_event(event)
        except ValueError:
            return              # an event that nobody can read ends no answer
        if self._usages:
            if pieces and pieces[0][0] is Kind.METER and self.plain.is_whole(pieces[0][1]):
                self._usages = []       # told anew: 3.5 us of an answer
            self._read_usages()
        self._send(self.assembler.feed(pieces), out)

    def _send(self, deltas: list, out: list[str]) -> None:
        if self.gate:
            deltas = self.gate.feed(deltas)
            self.is_done = self.gate.done
        out += map(self.render, deltas)
        self.has_said = self.has_said or any(out)


def translating_pipe(request: Request, target: Target, shape: AnswerShape,
                     render: Callable[[Any], str], understand: Callable[[Any], ProxyError]) -> Pipe:
    """The pipe from a target's language to the client's."""
    dialect = DIALECTS[target.provider.dialect]
    parser = dialect.parser(target)
    return Pipe(parser, shape._replace(call_prefix=DIALECTS[request.dialect].call_prefix), request,
                render, understand, dialect.plain and dialect.plain(parser))


class RelayPipe(Pipe):
    """The same for an upstream of the client's own language: events pass as they are through
    `machine`, which reads what must be known; a whole answer passes as one."""

    def __init__(self, machine: Any, is_stream: bool, understand: Callable[[Any], ProxyError]):
        self.splitter, self.machine, self.is_stream = SseSplitter(whole_events), machine, is_stream
        self.understand = understand
        self.fault, self.is_done, self._parts = None, False, []

    @property
    def has_content(self) -> bool:
        return self.is_stream and self.machine.has_content

    def usage(self) -> Usage:
        return self.machine.usage()

    @property
    def is_metered(self) -> bool:
        return "input" in self.machine.counts

    def feed(self, data: bytes) -> bytes:
        if self.is_stream:
            return super().feed(data)
        self._parts.append(data)
        return b""

    leaves_whole = True

    def _events(self, out: list[str], data: bytes) -> None:
        for event in self.splitter.feed(data):
            self._event(event, out)

    def _end(self, out: list[str]) -> None:
        if not self.is_stream:
            out.append(self.machine.whole(b"".join(self._parts)).decode("utf-8"))
            return
        for event in self.splitter.end():       # without its empty line: perhaps half of one
            data = next((line[5:] for line in event.split("\n") if line[:5] == "data:"), "")
            if not self.machine.has_finish and data.strip() not in ("", "[DONE]"):
                json_decode(data.encode("utf-8"))       # raises: the answer was cut
            self._event(event, out)
        if not self.is_done:
            out.append(self.machine.end())

    def _event(self, event: str, out: list[str]) -> None:
        if self.is_done:
            return
        if event.startswith("{") and not self.machine.has_content:
            raise UpstreamFault(json_decode(event.encode("utf-8")))     # an error, no stream
        out.append(self.machine.feed(event))
        if self.machine.is_over:
            out.append(self.machine.end())
            self.is_done = True


def vertex_host(url: str, project: str) -> str:
    """Vertex has a host for each place, which stands in the project as `project/place`."""
    place = project.partition("/")[2]
    if "//aiplatform.googleapis.com" not in url or place in ("", "global"):
        return url
    if place in ("us", "eu"):
        return url.replace("aiplatform.googleapis", f"aiplatform.{place}.rep.googleapis")
    return url.replace("//aiplatform", f"//{place}-aiplatform")


# What rules change in a body

def _set_at(body: Any, path: str, value: Any, is_default: bool) -> Any:
    head, _, rest = path.partition(".")
    if isinstance(body, list):      # an item by its number, or all by `*`
        return [(_set_at(item, rest, value, is_default) if rest else
                 item if is_default else value) if head in ("*", str(at)) else item
                for at, item in enumerate(body)]
    body = object_of(body)
    if rest:
        return {**body, head: _set_at(body.get(head), rest, value, is_default)}
    return body if is_default and head in body else {**body, head: value}


def prepended(body: dict, text: str, dialect: str) -> dict:
    """An upstream's body with a text before its system texts."""
    if dialect == "chat":
        return {**body, "messages": [{"role": "system", "content": text},
                                     *body.get("messages", ())]}
    if dialect == "responses":
        told = body.get("instructions")
        return {**body, "instructions": f"{text}\n\n{told}" if told else text}
    if dialect == "gemini":
        name = "system_instruction" if "system_instruction" in body else "systemInstruction"
        told = object_of(body.get(name))
        return {**body, name: {**told, "parts": [{"text": text}, *objects_of(told.get("parts"))]}}
    told = body.get("system") or []
    rows = told if isinstance(told, list) else [{"type": "text", "text": told}]
    return {**body, "system": [{"type": "text", "text": text}, *rows]}


def edited_body(body: Any, edits: Iterable[Edit], provider: Provider) -> Any:
    """What goes upstream after the rules; of a relayed body only the members they name change."""
    raw = body if isinstance(body, bytes) else None
    whole = json.loads(raw) if raw is not None else body
    inner = old = whole["request"] if provider.envelope else whole
    for edit in edits:
        for values, is_default in ((edit.set, False), (edit.default, True)):
            for path, value in values.items():
                inner = _set_at(inner, path, value, is_default)
        for path in (p.split(".") for p in edit.drop):
            inner = without(inner, path) if path[0] in inner else inner
        if edit.system:
            inner = prepended(inner, edit.system, provider.dialect)
    if raw is None:
        return {**whole, "request": inner} if provider.envelope else inner
    return json_splice(raw.decode("utf-8"), {
        name: json_encode(inner[name]) if name in inner else None for name in {*old, *inner}
        if name not in inner or name not in old or inner[name] is not old[name]}).encode("utf-8")


# Calls

class Call(NamedTuple):
    """Everything of one call but the network."""
    base_url: str
    path: str
    headers: Mapping[str, str]
    body: bytes
    proxy: str
    pipe: Pipe
    understand: Callable[[int, Mapping, Any], ProxyError]      # (status, headers, raw body)
    first_byte_s: float
    max_bytes: int = 1 << 40


class UpstreamAnswer:
    """An open answer.  `read` takes one read's bytes through framing and pipe; then `fault` or
    `is_done` tell whether it is over.  Whoever holds it closes it once."""

    def __init__(self, connection: Connection, body: BodyReader, pipe: Pipe, keeps_alive: bool,
                 headers: Mapping[str, str]):
        self.connection, self.body, self.pipe = connection, body, pipe
        self.headers = headers
        self.keeps_alive = keeps_alive
        self.fault: ProxyError | None = None
        self.is_done = self.is_reusable = False

    def read(self) -> bytes | None:
        """Output of what one recv brought; None when nothing is there yet (non-blocking)."""
        try:
            data = self.connection.sock.recv(RECV_BYTES)
        except NOT_YET:
            return None
        except OSError as err:
            self.fault = network_error(err, self.connection.host)
            return b""
        return self.take(data)

    def _finish_body(self) -> None:
        """The answer is over before its body: mostly only the framing's end is left, and the
        connection can be kept when that is here already."""
        with contextlib.suppress(OSError, ValueError, OverflowError):   # not here: not kept
            if not self.body.done:
                self.body.feed(self.connection.sock.recv(RECV_BYTES))
            self.is_reusable = (self.keeps_alive and self.body.done and not self.body.rest
                                and self.pipe.leaves_whole)

    def take(self, data: bytes) -> bytes:
        """Output of raw bytes; b"" means the connection ended."""
        pipe = self.pipe
        try:
            body = self.body.feed(data) if data else b""
        except (ValueError, OverflowError) as err:
            self.fault = ProxyError("cut", f"the upstream's answer is damaged: {err}")
            return b""
        out = pipe.feed(body)
        if pipe.fault is not None:
            self.fault = pipe.fault
        elif pipe.is_done:
            self.is_done = True
            self._finish_body()
        elif self.body.done or (not data and self.body.end()):
            out += pipe.end()
            self.fault = pipe.fault
            self.is_done = self.fault is None
            self.is_reusable = self.keeps_alive and self.body.done and not self.body.rest
        elif not data:
            self.fault = ProxyError("cut", "the upstream closed the connection in mid-answer")
        return out


def _early_answer(sock: socket.socket, message: bytes) -> bytes:
    """Sends all of a message; gives what was said by one who hung up before that: mostly that it is
    too big.  Raises OSError."""
    try:
        send_all(sock, message)
    except socket.timeout:
        raise           # it is still there: nothing may follow half a message
    except OSError as err:
        with contextlib.suppress(OSError):      # it said nothing: the failure is all there is
            data = sock.recv(RECV_BYTES)
            if data:
                return data
        raise err
    return b""


def _send_call(connections: ConnectionCache, call: Call, wait: Any, config: Config) -> tuple:
    """(connection, first bytes of the answer).  A kept connection that ends before its first byte
    is replaced by a fresh one, once."""
    base = urllib.parse.urlsplit(call.base_url)
    lines = [f"POST {base.path.rstrip('/')}{call.path} HTTP/1.1", f"Host: {base.netloc}",
             f"Content-Length: {len(call.body)}"]
    lines += [f"{name}: {value}" for name, value in call.headers.items()]
    head = "\r\n".join(lines)
    if head.count("\n") != len(lines) - 1 or head.count("\r") != len(lines) - 1:
        raise ProxyError("internal", "a header towards the upstream holds a line break")
    message = b"%s\r\n\r\n%s" % (head.encode("latin-1", "replace"), call.body)
    fresh = False
    while True:
        connection = connections.take(call.base_url, config.connect_timeout_s, call.proxy, fresh)
        try:
            data = _early_answer(connection.sock, message) or receive(
                connection.sock, wait, call.first_byte_s)
            if data:
                return connection, data
            raise ConnectionResetError("closed without an answer")
        except OSError as err:
            connection.close()
            if not connection.is_used or isinstance(err, socket.timeout):
                raise network_error(err, connection.host) from err
            fresh = True
        except BaseException:
            connection.close()
            raise


def _read_answer_head(connection: Connection, data: bytes, wait: Any, config: Config) -> tuple:
    """(status, headers, bytes after the head), informational answers skipped."""
    while True:
        head, mark, rest = data.partition(b"\r\n\r\n")
        if not mark:
            if len(data) > MAX_HEAD_BYTES:
                raise ProxyError("network", f"{connection.host} sent an endless head")
            more = receive(connection.sock, wait, config.idle_timeout_s)
            if not more:
                raise ProxyError("network", f"{connection.host} closed the connection in its head")
            data += more
            continue
        parsed = parse_head(head, False)
        words = parsed.first.split(b" ", 2)
        if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
            raise ProxyError("network", f"{connection.host} does not speak HTTP/1.1")
        if not words[1].startswith(b"1"):
            return int(words[1]), parsed.headers, rest
        data = rest


def _read_whole(connection: Connection, body: BodyReader, data: bytes, wait: Any) -> bytes:
    """The body of an error, for at most ten seconds; what is there counts when it is cut."""
    parts = [body.feed(data)] if data else []
    deadline = time.monotonic() + 10
    while not body.done:
        data = receive(connection.sock, wait, max(0.0, deadline - time.monotonic()))
        if not data:
            break
        parts.append(body.feed(data))
    return b"".join(parts)


def upstream_call(connections: ConnectionCache, call: Call,
                  wait: Callable[[socket.socket, float], None],
                  config: Config) -> tuple[UpstreamAnswer, bytes]:
    """(open answer, its output up to the first content).  Raises ProxyError for everything that is
    not the beginning of a usable answer.  `wait(sock, seconds)` returns when `sock` is readable,
    raises ProxyError stall after `seconds` and ClientGone when nobody waits any more."""
    connection, data = _send_call(connections, call, wait, config)
    host = connection.host
    try:
        status, headers, rest = _read_answer_head(connection, data, wait, config)
        framing = body_framing(headers, False, status in (204, 304))
        most = MAX_ERROR_BYTES if status != 200 else call.max_bytes
        body = BodyReader(framing, most, headers.get("content-encoding", "").lower())
        keeps_alive = framing != "close" and headers.get("connection", "").lower() != "close"
        if status != 200:
            raw = _read_whole(connection, body, rest, wait)
            if keeps_alive and body.done and not body.rest:
                connections.give(connection)
                connection = None       # no longer ours to close
            raise call.understand(status, headers, raw)
        answer = UpstreamAnswer(connection, body, call.pipe, keeps_alive, headers)
        out = answer.take(rest) if rest or body.done else b""
        while not (call.pipe.has_content or answer.is_done or answer.fault):
            wait(connection.sock, config.idle_timeout_s)
            out += answer.read() or b""
        if answer.fault and not call.pipe.has_content:
            raise answer.fault
        # a refusal told as model text
        return answer, out
    except BaseException as err:
        if connection is not None:
            connection.close()
        if isinstance(err, OSError):
            raise network_error(err, host) from err
        if isinstance(err, (ValueError, OverflowError)):
            raise ProxyError("network", f"{host} sent a damaged answer: {err}") from err
        raise


# ── 16. Conductor ─────────────────────────────────────────────────────────
# One request's attempts over accounts: choose, call, read the meaning,
# settle, repeat, wait or finish.  Until the first content goes out a failure
# is somebody else's turn; after it nothing is ever retried.


class OpenStream:
    """An answer under way with all that belongs to it.  The one who holds it, thread or relay,
    calls `close` exactly once: it settles the lease, keeps or closes the connection, and counts."""

    def __init__(self, answer: UpstreamAnswer, lease: Lease, connections: ConnectionCache,
                 record: Record):
        self.answer, self.lease, self.connections, self.record = answer, lease, connections, record
        self.on_usage: Callable[[int], None] = lambda tokens: None      # true input, all of it

    def close(self, error: ProxyError | None = None, is_gone: bool = False) -> None:
        usage = self.answer.pipe.usage()
        self.record.input_tokens = usage.input_tokens + usage.written_tokens
        self.record.cached_tokens = usage.cached_tokens
        self.record.output_tokens = usage.output_tokens
        if error is None and not is_gone and self.answer.pipe.is_metered:
            self.on_usage(usage.input_tokens + usage.cached_tokens + usage.written_tokens)
        if self.answer.is_reusable and error is None and not is_gone:
            self.connections.give(self.answer.connection)
        else:
            self.answer.connection.close()
        if error is not None:
            self.record.failures.append(f"{self.lease.candidate.account.label}: {error.kind}")
        self.lease.settle(error, is_success=error is None and not is_gone)


@dataclass
class Services:
    """What every request needs, made once."""
    config: Config
    pool: AccountPool
    connections: ConnectionCache
    clock: Clock
    log: Log
    meters: Meters
    signatures: Any             # a Memory
    tokens: Tokens
    calibration: Calibration
    state: State | None = None
    replies: Replies | None = None
    keeper: Keeper | None = None
    simulator: str = ""         # its URL, where it is the upstream
    workers: int = 1            # processes that serve the port
    learned: dict = field(default_factory=dict)     # (provider, model, dialect) -> lasting repairs
    learning: Any = field(default_factory=threading.Lock)       # guards what is added to learned
    # content key -> tokens an upstream counted; whoever asks in between asks the upstream again
    counts: dict = field(default_factory=dict)
    counting: Any = field(default_factory=lambda: threading.BoundedSemaphore(8))
    stopping: threading.Event = field(default_factory=threading.Event)     # grace time is over

    def plan(self, name: str, wanted: str = "", seed: str | None = None) -> Plan:
        """Who serves what a name means; raises ProxyError not_found.  What an upstream serves may
        not have been asked yet."""
        wanted = wanted or model_variant(name)[0]
        try:
            return self.pool.plan(name, wanted, self.config, seed)
        except ProxyError:
            if self.keeper is None or not self.keeper.list_missing():
                raise
        return self.pool.plan(name, wanted, self.config, seed)

    def candidates(self, name: str, wanted: str = "") -> list[Candidate]:
        return self.plan(name, wanted).candidates

    def count(self, request: Request, model: Model) -> int:
        """Our own count of a request's input tokens for a model, as calibrated."""
        return max(1, int(estimate_tokens(request, token_family(model))
                          * self.calibration.factor(model.id)))


# Rules

def rule_holds(when: Mapping, request: Request, headers: Mapping[str, str],
               count: Callable[[], int], provider: Provider | None = None,
               served: str = "") -> bool:
    """Whether all conditions of a rule hold; those about an upstream only where one is given, and
    `model` there for the one that is `served` too."""
    def is_like(text: str, pattern: str) -> bool:
        return fnmatch.fnmatchcase(text.lower(), pattern.lower())
    checks: dict[str, Callable[[Any], bool]] = {
        "model": lambda p: any(is_like(m, p) for m in (request.model, request.wanted, served) if m),
        "client": lambda p: request.dialect == p,
        "upstream": lambda p: provider is not None and provider.dialect == p,
        "provider": lambda p: provider is not None and is_like(provider.id, p),
        "headers": lambda rows: all(is_like(headers.get(n.lower(), ""), p)
                                    for n, p in rows.items()),
        "tool": lambda p: any(is_like(t.name, p) for t in request.tools),
        "over_tokens": lambda n: count() > n, "under_tokens": lambda n: count() < n,
        "has_tools": lambda b: bool(request.tools) is b,
        "has_images": lambda b: any(not m.media_type.startswith("audio/")
                                    for m in request.media) is b,
        "thinks": lambda b: (request.thinking.is_on is True) is b,
        "streams": lambda b: request.is_streaming is b}
    return all(checks[name](wanted) for name, wanted in when.items())


def route_for(request: Request, headers: Mapping[str, str], config: Config,
              count: Callable[[], int]) -> tuple[str, str]:
    """(the name that serves instead of the one asked for, why); ("", "") where that stays.  Rules
    come before roles; who names a group or a provider gets it."""
    for number, rule in enumerate(config.rules):
        if rule.to and rule_holds(rule.when, request, headers, count):
            return rule.to, f"rule {number + 1}"
    if not config.routes and not request.small:     # nothing to decide
        return "", ""
    head = request.wanted.partition("/")
    if request.wanted.lower() in config.groups or head[1] and head[0].lower() in config.providers:
        return "", ""
    roles: dict[str, Callable[[int], bool]] = {
        "long_context": lambda over: count() > over,
        "background": lambda _: bool(request.small) or "haiku" in request.wanted.lower(),
        "web_search": lambda _: request.search is not None,
        "image": lambda _: any(m.media_type.startswith("image/") for m in request.media),
        "think": lambda _: request.thinking.is_on is True, "default": lambda _: True}
    for role, is_meant in roles.items():
        to, over = config.routes.get(role, ("", 0))
        if role == "background" and not to and request.small:
            to = config.background_model
        if to and is_meant(over):
            return to, role
    return "", ""


def as_variant(request: Request, name: str) -> Request:
    """The request under a name that may say how to think; "" changes nothing."""
    wanted, wish = model_variant(name)
    if not wish:
        return request
    return replace(request, model=name, wanted=wanted,
                   thinking=replace(wish, shows=request.thinking.is_shown))


def initiator_headers(request: Request) -> dict[str, str]:
    """What a service that bills by it is told, truthfully: who spoke last, and whether there are
    images."""
    last = request.turns[-1].blocks if request.turns else ()
    is_tool = any(isinstance(b, ToolResult) for b in last)
    return {"X-Initiator": "agent" if is_tool else "user",
            **({"Copilot-Vision-Request": "true"} if request.media else {})}


def call_head(candidate: Candidate, provider: Provider, request: Request, token: str,
              rendered: Rendered) -> dict[str, str]:
    """Everything that goes into the head of a call, the owner's own headers last."""
    account = candidate.account
    return call_headers(
        {"Content-Type": "application/json", "Accept-Encoding": "identity",
         "User-Agent": user_agent(account, provider, candidate.upstream_id)},
        initiator_headers(request) if "initiator" in provider.quirks else {},
        auth_header(provider, token), rendered.headers, dict(provider.headers),
        dict(account.headers))


class Estimate:
    """Our own count of a request's tokens, asked for where nobody else tells.  After `let_go` it is
    0: an answer that goes on for minutes and is metered need not keep its request."""

    def __init__(self, services: Services, request: Request, model: Model):
        self.services, self.model = services, model
        self.request: Request | None = request

    def __call__(self) -> int:
        return self.services.count(self.request, self.model) if self.request is not None else 0

    def let_go(self) -> None:
        self.request = None


@dataclass
class Attempt:
    """One candidate's turn, with what its failures so far have taught."""
    hosts: list[str]                # those still to be asked
    seen: set[str] = field(default_factory=set)     # kinds that were answered once already
    token: str = ""                 # of the last call
    refused: str = ""               # a token that was answered 401
    repairs: frozenset = frozenset()    # that refusals asked for
    mended: list[str] = field(default_factory=list)     # ... in this request, in order
    sent: tuple = ()                # signatures of the last call
    looks_up: bool = False          # the project is asked for again


OTHERS_MAY = ("form", "too_long", "bad_request", "no_search")  # what another of a group may take


class Conducting:
    """One request on its way over the accounts.  `client` is who waits for it: it has
    `wait(sock, seconds)`, `pause(seconds)`, `wake()`, `aim(model, is_relayed)`, `render(delta)` and
    its dialect's `state`, and takes `pipe`, `route` and `more_headers`."""

    def __init__(self, services: Services, request: Request, client: Any, record: Record):
        self.services, self.request, self.client, self.record = services, request, client, record
        self.candidates: list[Candidate] = []
        self.tried: set[Candidate] = set()
        self.tries_left = services.config.max_attempts
        self.empties_left = services.config.max_empty_retries
        self.soft_failures = 0
        self.began = services.clock.monotonic()
        self.waited_s = 0.0
        self.last: ProxyError | None = None
        self.is_fallback = self.is_group = False

    def run(self, fold: bool) -> tuple[OpenStream, bytes] | Reply | bytes:
        """A stream from its first content on, with what is to be sent first; or the whole Reply,
        as bytes where it came in the client's own language."""
        services, request = self.services, self.request
        ask = Ask(request.conversation, request.agent, self.client.wake)
        self._aim(services.plan(request.model, request.wanted, request.conversation))
        try:
            while True:
                choice = services.pool.lease(self.candidates, self.tried, ask)
                if choice.lease is not None or not self.record.choices or (
                        self.record.choices[-1][1] != choice.reason):   # one line for a whole wait
                    self.record.choices.append((services.clock.now(), choice.reason,
                                                choice.verdicts))
                if choice.lease is None:
                    self._wait(choice)
                    continue
                with choice.lease as lease:
                    try:
                        return self._try(lease, fold)
                    except ProxyError as err:
                        self.last = err
                        lease.settle(err)
                self._after(lease.candidate, self.last)
        finally:
            services.pool.leave(ask)

    def _aim(self, plan: Plan) -> None:
        """Candidates for a plan; what others cannot take goes to its own dialect only."""
        self.used, self.record.used = plan.models[0], plan.models[0].id
        self.candidates, self.is_group = plan.candidates, plan.is_group
        if self.request.search is not None:
            self.candidates = self._searchers(self.candidates)
        if self.request.refusal is not None or self.request.max_tokens == 0:
            self.candidates = [c for c in self.candidates if self.request.is_native_to(c.provider)]
        if self.request.refusal is not None and not self.candidates:
            raise self.request.refusal
        if self.request.media:
            self._leave_out_unable()

    def _spoken(self, candidate: Candidate) -> Provider:
        """The candidate's provider with the endpoint that suits this client."""
        return candidate.provider.speaking(self.request.dialect)

    def _leave_out_unable(self) -> None:
        """Without those who cannot take the request's media; ProxyError where nobody can."""
        told = [unsupported(self.request, self._spoken(c), c.model) for c in self.candidates]
        able = [c for c, why in zip(self.candidates, told) if not why]
        if told and not able:
            raise ProxyError("bad_request", told[0])
        self.candidates = able

    def _searchers(self, candidates: list[Candidate]) -> list[Candidate]:
        """Those who can look at the web themselves, else the search model's; ProxyError no_search
        where nobody can."""
        services, wish = self.services, self.request.search

        def able(candidates: list[Candidate]) -> list[Candidate]:
            return [c for c in candidates if self.request.is_native_to(c.provider) or (
                DIALECTS[self._spoken(c).dialect].can_search or (lambda *_: False))(
                    c.model, self._spoken(c), wish)]
        found = able(candidates)
        with contextlib.suppress(ProxyError):       # the search model may not be known here
            if not found:
                found = able(services.candidates(services.config.search_model))
                if found:
                    self._route_by("search_model")
        if candidates and not found:
            raise ProxyError("no_search", f"no account here can do a {wish.tool} for "
                             f"{self.request.model}; add one with a Gemini model, or an Anthropic "
                             "key: `python3 agproxy.py accounts add`")
        return found

    def _route_by(self, why: str) -> None:
        """Notes what gave the request another model, beside what did before."""
        routed = ", ".join(dict.fromkeys(filter(None, (self.request.routed, why))))
        self.request = replace(self.request, routed=routed)
        self.record.tell(f"routed: {why}")

    def _elapsed_s(self) -> float:
        return self.services.clock.monotonic() - self.began

    def _refuse(self, verdicts: tuple) -> None:
        """The end, unless the model's pair may serve instead: one hop, no chains."""
        now = self.services.clock.now()
        if not verdicts and self.services.pool.accounts and not self.request.max_tokens == 0:
            raise ProxyError("not_found", f"model: no account serves {self.request.model}; run "
                             "`python3 agproxy.py models` to see which account serves what")
        if self.last and self.last.kind in OTHERS_MAY:
            raise self.last
        refused = refusal(self.request.model, verdicts, now, self.last)
        refused.headers = self.last.headers if self.last else {}
        pair = fallback_for(self.used) if self.used.id in MODELS else ""
        is_named = self.request.wanted.lower() in self.services.config.groups  # has its own order
        if (not self.services.config.fallback or not pair or self.is_fallback or is_named
                or self.request.refusal is not None
                or refused.kind not in ("exhausted", "quota", "rate", "soft_429", "capacity")):
            raise refused
        model = MODELS[pair]
        others = self.services.pool.candidates(model)
        if all(v.state == "stopped" for v in self.services.pool.verdicts(others, ())):
            raise refused
        self.is_fallback = True
        self.record.tell(f"fell back from {self.used.id}")
        self.tries_left, self.soft_failures = self.services.config.max_attempts, 0
        self._aim(Plan((model,), others))

    def _wait(self, choice: Choice) -> None:
        """Waits for the soonest release, or refuses where that is too far away."""
        wait_s, config = choice.wait_s, self.services.config
        if (wait_s is None or self.waited_s + wait_s > config.max_wait_s
                or self._elapsed_s() + wait_s > LAST_TRY_BEGINS_S):
            self._refuse(choice.verdicts)
            return
        paused_at = self._elapsed_s()
        self.client.pause(wait_s)
        self.waited_s += self._elapsed_s() - paused_at

    def _after(self, candidate: Candidate, error: ProxyError) -> None:
        """After a candidate failed: the next one, or the answer to the client."""
        if error.rule.step in (Step.CLIENT, Step.REPAIR):
            others = [c for c in self.candidates if c not in self.tried
                      and (c.provider.id, c.model.id) != (candidate.provider.id,
                                                          candidate.model.id)]
            if not (self.is_group and others and error.kind in OTHERS_MAY):
                raise error
            self.tried.update(c for c in self.candidates if c not in others)
            return
        if error.kind == "absent":
            pool, pair = self.services.pool, (candidate.account.name, candidate.provider.id)
            known = pool.facts(pair) or Facts("", "", "", (), 0)
            pool.note_facts(pair, known._replace(absent=error.message, at=pool.clock.now()))
        if error.kind in ("quota", "soft_429") and self.services.keeper:
            self.services.keeper.after_quota(candidate.account, candidate.provider)
        if not is_stated(error) and error.kind not in LOGIN_KINDS:
            # a stated rest blocks it by itself, and may end while we wait
            self.tried.add(candidate)
        if error.kind == "capacity":        # another account of the pool meets the same crowd
            self.tried.update(c for c in self.candidates
                              if c.provider.id == candidate.provider.id)
        self.soft_failures += error.kind == "soft_429"
        if self.tries_left <= 0 or self.soft_failures >= 2 or self._elapsed_s() > LAST_TRY_BEGINS_S:
            self._refuse(self.services.pool.verdicts(self.candidates, self.tried))

    def _try(self, lease: Lease, fold: bool) -> Any:
        """All calls one candidate gets: hosts in order, a refreshed token, a repaired conversation,
        a short wait.  Raises the ProxyError that ended its turn."""
        candidate, pool = lease.candidate, self.services.pool
        provider = self._spoken(candidate)
        key = candidate.provider.id, candidate.upstream_id, provider.dialect
        attempt = Attempt(pool.hosts(provider),
                          repairs=self.services.learned.get(key, frozenset()))
        while True:
            self.record.attempts += 1
            self.record.account, self.record.used = candidate.account.label, candidate.model.id
            try:
                result = self._call(lease, attempt, fold)
                pool.host_answered(attempt.hosts[0])
                pool.proved(lease)
                if attempt.mended:
                    self._learn(key, attempt)
                return result
            except ProxyError as err:
                error = err
            self.record.failures.append(f"{candidate.account.label}: {error.kind}")
            if not (error.kind in LOGIN_KINDS or is_stated(error) or error.rule.rest in LONG_RESTS):
                self.tries_left -= 1        # what marks its candidate lets the next one have a turn
            if error.rule.scope is Scope.HOST:
                pool.rest_host(attempt.hosts[0], error)
            if not self._may_try_again(attempt, error, provider):
                raise error

    def _learn(self, key: tuple, attempt: Attempt) -> None:
        """A repaired request was accepted: what every request will need is kept, and so is which
        signatures were refused."""
        lasting = frozenset(filter(is_lasting, attempt.mended))
        with self.services.learning:
            self.services.learned[key] = self.services.learned.get(key, frozenset()) | lasting
        if "signatures" in attempt.mended:
            for raw in attempt.sent:
                self.services.signatures[content_key("bad", raw)] = ("", "", "bad")
        self.services.meters.add(repaired=1)

    def _may_try_again(self, attempt: Attempt, error: ProxyError, provider: Provider) -> bool:
        """Whether the same candidate gets one more call, after the pause or change it needs."""
        step, is_first = error.rule.step, error.kind not in attempt.seen
        if step is Step.REPAIR:
            repair = next_repair(error.message, self.request.is_native_to(provider),
                                 attempt.repairs)
            if not repair or len(attempt.mended) >= 3:
                return False
            attempt.repairs |= {repair}
            attempt.mended.append(repair)
            return True
        if error.kind == "empty" and self.empties_left > 0:
            self.empties_left -= 1
            self.client.pause(error.rule.pause_s * (1 if is_first else 2))
        elif self.tries_left <= 0 or not is_first:
            return False
        elif step is Step.HOST and len(attempt.hosts) > 1:
            attempt.hosts = attempt.hosts[1:]
            self.client.pause(error.rule.pause_s)
        elif error.kind == "rate" and (error.delay_s or 99) <= WAIT_AT_MOST_IN_PLACE_S:
            self.client.pause(max(1.0, error.delay_s))
        elif step is Step.ONE_MORE or error.kind == "capacity":
            self.client.pause(error.rule.pause_s)
        elif step is Step.REFRESH and attempt.token:
            attempt.refused = attempt.token
        elif step is Step.DISCOVER and attempt.token and provider.envelope:
            attempt.looks_up = True
        else:
            return False
        if step is not Step.HOST or error.kind == "capacity":
            attempt.seen.add(error.kind)
        return True

    def _project(self, lease: Lease, attempt: Attempt) -> str:
        """The project for this pool, the attempt's token being set on the way; ProxyError absent
        where the pool turns out to be none."""
        services, candidate = self.services, lease.candidate
        account, provider = candidate.account, candidate.provider
        attempt.token = services.tokens.access(account, attempt.refused)
        if not provider.envelope:
            return account.project
        facts = pool_facts(services.pool, services.tokens, account, provider, attempt.token,
                           attempt.looks_up, self.client.pause)
        if facts.absent:
            raise ProxyError("absent", facts.absent)
        return account.project or facts.project

    def _rendered(self, request: Request, target: Target, attempt: Attempt,
                  count: Callable[[], int]) -> Rendered:
        """What goes upstream, after the owner's rules; what was mended in it is noted."""
        provider = target.provider
        rendered = rendered_for(request, target, self.services.signatures, attempt.repairs)
        edits = [e for e in self.services.config.rules if e[2:] != Edit({})[2:] and rule_holds(
            e.when, request, self.client.headers, count, provider, target.upstream_id)]
        if edits:
            rendered = rendered._replace(body=edited_body(rendered.body, edits, provider))
        attempt.sent = rendered.sent or attempt.sent
        self.record.mended, self.record.refused = rendered.mended, tuple(attempt.mended)
        return rendered

    def _call(self, lease: Lease, attempt: Attempt, fold: bool) -> Any:
        """One call: an open stream, or the whole reply."""
        services, candidate = self.services, lease.candidate
        request = as_variant(self.request, candidate.variant)
        account, provider, config = candidate.account, self._spoken(candidate), services.config
        dialect, project = DIALECTS[provider.dialect], self._project(lease, attempt)
        target = Target(candidate.model, provider, candidate.upstream_id, project,
                        config.tool_hardening)
        is_relayed = request.is_native_to(provider)
        self.client.aim(candidate.model, is_relayed)
        estimate = Estimate(services, request, candidate.model)
        rendered = self._rendered(request, target, attempt, estimate)

        def note_limits(head: Mapping[str, str]) -> None:
            windows = read_limit_headers(head, services.clock.now())
            if windows:
                services.pool.note_windows(candidate.pair, windows)

        def understand(status: int, head: Mapping[str, str], raw: Any) -> ProxyError:
            note_limits(head)
            error = read_meaning(status, head, raw, services.clock.now(), estimate,
                                 candidate.model.context_tokens)
            return (told_verbatim(error, status, head, raw, dialect.is_error) if is_relayed
                    else error)

        def understand_event(body: Any) -> ProxyError:
            return understand(200, {}, body)

        deltas: list = []
        render = self.client.render if not fold else lambda delta: deltas.append(delta) or ""
        if is_relayed:
            pipe: Pipe = RelayPipe(dialect.relay(self.client.state), request.is_streaming,
                                   understand_event)
        else:
            pipe = translating_pipe(request, target, rendered.shape._replace(
                estimate_input=estimate), render, understand_event)
        self.client.pipe = pipe
        is_whole = is_relayed and not request.is_streaming
        call = Call(vertex_host(attempt.hosts[0], project), dialect.path(target, request),
                    call_head(candidate, provider, request, attempt.token, rendered),
                    rendered.raw, account.proxy, pipe, understand,
                    config.unary_timeout_s if is_whole else config.first_byte_timeout_s,
                    MAX_REPLY_BYTES if is_whole else 1 << 40)
        answer, out = upstream_call(services.connections, call, self.client.wait, config)
        note_limits(answer.headers)
        stream = OpenStream(answer, lease, services.connections, self.record)
        if request.refusal is None and request.search is None and (     # these have more than that
                services.calibration.is_due(candidate.model.id)):
            family = token_family(candidate.model)
            stream.on_usage = lambda true: services.calibration.note(
                candidate.model.id, lambda: estimate_tokens(request, family), true)
        self._tell(lease, attempt, relayed_headers(answer.headers) if is_relayed else {})
        if is_whole:
            stream.close()
            return out
        if fold:
            return self._fold(stream, deltas)
        lease.is_passed_on = True
        if pipe.is_metered:
            estimate.let_go()
        return stream, out

    def _tell(self, lease: Lease, attempt: Attempt, headers: dict[str, str]) -> None:
        """What the head of the answer says about how it came to be."""
        routed = f"; {self.request.routed}" if self.request.routed else ""
        self.client.route = f"{lease.candidate.account.label}; {lease.reason}{routed}"
        self.client.more_headers = dict(headers)
        if self.request.left_out and not self.request.is_native_to(lease.candidate.provider):
            told = ", ".join(self.request.left_out)
            self.client.more_headers["x-agproxy-left-out"] = told
            self.record.tell("left out: " + told)
        if attempt.mended:
            self.client.more_headers["x-agproxy-repair"] = ", ".join(attempt.mended)
            self.record.tell("repaired: " + ", ".join(attempt.mended))

    def _fold(self, stream: OpenStream, deltas: list) -> Reply:
        """Reads the stream to its end; a failure on the way is the attempt's."""
        answer, config = stream.answer, self.services.config
        try:
            while not (answer.is_done or answer.fault):
                self.client.wait(answer.connection.sock, config.idle_timeout_s)
                answer.read()
            if answer.fault:
                raise answer.fault
            reply = collect(deltas)
        except BaseException:
            answer.connection.close()       # the lease is settled by whoever catches this
            raise
        stream.close()
        return reply


def count_upstream(services: Services, request: Request) -> int | None:
    """Input tokens as an upstream of the model counts them; None where none can, is free to, or
    answers in time.  Counts are asked for by the dozen: what fails counts against nobody."""
    pool = services.pool
    for verdict in pool.verdicts(services.candidates(request.model, request.wanted), ()):
        candidate = verdict.candidate
        account, provider = candidate.account, candidate.provider.speaking(request.dialect)
        dialect = DIALECTS[provider.dialect]
        target = Target(candidate.model, provider, candidate.upstream_id, account.project)
        if verdict.state not in ("usable", "soft", "busy") or (
                request.refusal and not request.is_native_to(provider)):
            continue
        path = dialect.count.path(target) if dialect.count else ""
        if not path or (provider.id, "count") in services.learned or (
                not services.counting.acquire(blocking=False)):
            return None             # nobody waits in line for a count
        try:
            repairs = services.learned.get((provider.id, candidate.upstream_id, provider.dialect),
                                           frozenset())
            rendered = rendered_for(request, target, services.signatures, repairs)
            raw = rendered._replace(body=dialect.count.wrap(rendered.body, target)).raw
            key = content_key(candidate.upstream_id, raw.decode("utf-8"))
            count = services.counts.get(key)
            if count is None:
                headers = call_head(candidate, provider, request,
                                    services.tokens.access(account), rendered)
                status, _, answer = simple_call(
                    services.connections, "POST",
                    vertex_host(pool.hosts(provider)[0], account.project) + path, headers, raw,
                    account.proxy, COUNT_TIMEOUT_S)
                if status == 404:       # merely compatible: not asked again
                    services.learned[provider.id, "count"] = frozenset(("none",))
                count = object_of(json_decode(answer)).get(dialect.count.member)
                if status != 200 or not isinstance(count, int):
                    return None
                if len(services.counts) > 1000:
                    services.counts.clear()
                services.counts[key] = count
            return count
        except (ProxyError, ValueError):
            return None             # the estimate will do
        finally:
            services.counting.release()
    return None


# ── 17. Relay and server ──────────────────────────────────────────────────
# The client's side: heads and bodies read under absolute deadlines, one table
# of routes, answers in the caller's dialect.  A connection has a thread only
# while a request may still need a second try; established streams and idle
# connections live in the relay, one thread with one selector.


class Peek(enum.Enum):
    """What a client's readable socket says while its answer is under way."""
    NOTHING = "nothing"
    MORE = "bytes of its next request"
    GONE = "its end"


class Downstream:
    """One client connection.  Owned by one thread or by the relay, never by both.  `buffer` holds
    bytes read past what was consumed: the beginning of a pipelined request."""

    def __init__(self, sock: socket.socket):
        sock.setblocking(False)
        self.sock, self.buffer, self.is_closed = sock, b"", False

    def shakes_hands(self, context: ssl.SSLContext, deadline: float) -> bool:
        """Whether it goes on by TLS; a client that cannot before `deadline` could not be told."""
        if isinstance(self.sock, ssl.SSLSocket):
            return True
        with contextlib.suppress(OSError):
            self.sock = context.wrap_socket(self.sock, True, do_handshake_on_connect=False)
            while time.monotonic() < deadline:
                try:
                    self.sock.do_handshake()
                    return True
                except ssl.SSLWantReadError:
                    readable([self.sock], deadline - time.monotonic())
                except ssl.SSLWantWriteError:
                    writable(self.sock, max(0.0, deadline - time.monotonic()))
        return False

    def receive(self, deadline: float, what: str) -> bytes:
        """Some bytes before the monotonic `deadline`, b"" at the end; or ProxyError."""
        while True:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise ProxyError("slow_client", f"{what} did not arrive in time")
            try:
                return self.sock.recv(RECV_BYTES)
            except NOT_YET:
                readable([self.sock], left_s)
            except OSError:
                return b""

    def send(self, data: bytes) -> None:
        """All of `data`, or ClientGone: one that takes nothing for SEND_STALL_S is gone too."""
        try:
            send_all(self.sock, data)
        except OSError as err:
            raise ClientGone() from err

    def peek(self) -> Peek:
        """What its readable socket holds, without taking it."""
        try:
            if not isinstance(self.sock, ssl.SSLSocket):
                return Peek.MORE if self.sock.recv(1, socket.MSG_PEEK) else Peek.GONE
            more = self.sock.recv(RECV_BYTES)       # only TLS can tell its goodbye from a request
            self.buffer += more
            return Peek.MORE if more else Peek.GONE
        except NOT_YET:
            return Peek.NOTHING
        except OSError:
            return Peek.GONE

    def close(self, linger: bool = False) -> None:
        """Closes; with `linger` unread bytes are drained first, so that the client sees the answer
        instead of a reset."""
        self.is_closed = True
        with contextlib.suppress(OSError, ValueError):      # no handshake; the client left first
            if isinstance(self.sock, ssl.SSLSocket):
                self.sock.unwrap()      # says goodbye; does not wait for an answer
        with contextlib.suppress(OSError):      # the client may have closed first
            if linger:
                self.sock.shutdown(socket.SHUT_WR)
                self.sock.settimeout(0.2)
                deadline = time.monotonic() + 1
                while time.monotonic() < deadline and self.sock.recv(RECV_BYTES):
                    pass
        with contextlib.suppress(OSError):
            self.sock.close()


_REASONS = {200: b"OK", 204: b"No Content", 400: b"Bad Request", 401: b"Unauthorized",
            403: b"Forbidden", 404: b"Not Found", 405: b"Method Not Allowed",
            408: b"Request Timeout", 413: b"Content Too Large", 414: b"URI Too Long",
            415: b"Unsupported Media Type", 429: b"Too Many Requests",
            431: b"Request Header Fields Too Large", 500: b"Internal Server Error",
            502: b"Bad Gateway", 503: b"Service Unavailable", 504: b"Gateway Timeout",
            529: b"Overloaded"}
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@functools.lru_cache(maxsize=2)
def http_date(epoch_s: int) -> str:
    at = time.gmtime(epoch_s)
    return (f"{'Mon Tue Wed Thu Fri Sat Sun'.split()[at.tm_wday]}, {at.tm_mday:02} "
            f"{'Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec'.split()[at.tm_mon - 1]} "
            f"{at.tm_year} {at.tm_hour:02}:{at.tm_min:02}:{at.tm_sec:02} GMT")


def request_row(record: Record, now: float) -> dict:
    """A finished request as `why` tells it; `now` is monotonic."""
    row = {name: getattr(record, name) for name in (
        "id", "client", "asked", "used", "account", "status", "attempts", "failures", "note",
        "session", "agent", "parent",
        "refused", "input_tokens", "cached_tokens", "output_tokens")}
    row["mended"] = {what: count for what, count in record.mended.items() if count}
    row["total_ms"] = round((now - record.started_at) * 1000)
    row["choices"] = [{"at": at, "reason": reason, "sheet": sheet_rows(verdicts, at)}
                      for at, reason, verdicts in record.choices]
    said = " ".join((record.client, record.asked, record.agent, record.parent))
    return row if without_secrets(said) == said else redact_all(row)      # clients' own words


def spoken_at(path: str, headers: Mapping[str, str] = {}) -> str:
    """The dialect of a path, in which its errors are told."""
    if path.startswith(("/v1/models", "/models")) and "authorization" in headers and (
            "anthropic-version" not in headers):
        return "chat"
    if re.match(r"/v1beta\w*/(?!openai)|/v1/.+:\w+\Z", path):
        return "gemini"
    if re.search(r"/(completions|responses|embeddings|audio|images|moderations)\b|/openai/", path):
        return "chat"
    return "anthropic"


class Exchange:
    """One request and its answer, while its thread or the relay works on it.  Only `wake` comes
    from other threads: the lock, one for all of them, guards `is_woken` and `_waker`."""
    _waking = threading.Lock()
    model = MODELS["gemini-3-flash"]        # that is asked, as far as it is known

    def __init__(self, downstream: Downstream, services: Services, line: RequestLine,
                 headers: dict[str, str], body: bytes = b""):
        self.downstream, self.services = downstream, services
        self.method, self.path, self.query = line.method, line.path, line.query
        self.headers, self.body, self.dialect = headers, body, DIALECTS[
            spoken_at(line.path, headers)]
        self.record = Record(new_id("req_"), started_at=time.monotonic(),
                             client=cut(headers.get("user-agent", "-").split(" ")[0], 40))
        self.is_http_1_0 = line.is_http_1_0
        wants = headers.get("connection", "").lower()
        self.keeps_alive = "close" not in wants and (not self.is_http_1_0 or "keep-alive" in wants)
        self.cors_origin = ""
        self.user: UserKey | None = None            # whose key it brought
        self.is_stranger = False                    # addressed to a name that is not ours
        self.body_bytes = 0                         # also when the body is no longer needed
        self.is_started = self.is_open = False      # head sent; stream opened
        self.is_watching = True                     # the client's socket tells when it leaves
        self.route = ""                             # why this candidate
        self.more_headers: dict[str, str] = {}      # of the answer, beside the usual
        self.scale_window = 0                       # the client's, with usage_scaling
        self.pipe: Any = None                       # of the call under way
        self.state: Any = None                      # of the dialect's renderer
        self.request: Request | None = None
        self.is_woken, self._waker, self.is_relayed = False, None, False
        self.last_out_at = self.last_content_at = time.monotonic()

    # Answers

    def head_bytes(self, status: int, headers: Mapping[str, str]) -> bytes:
        """The head's bytes; upstream text never becomes a header with a line break in it."""
        self.is_started, self.record.status = True, status
        connection = "keep-alive" if self.keeps_alive else "close"
        fields = {"request-id": self.record.id, "connection": connection,
                  "date": http_date(int(time.time())), **headers}
        if self.cors_origin:
            fields.update({"access-control-allow-origin": self.cors_origin, "vary": "origin"})
        if self.record.used != "-":
            fields["x-agproxy-model"] = self.record.used
            fields["x-agproxy-account"] = self.record.account
        if self.route:
            fields["x-agproxy-route"] = self.route
        if self.dialect is not DIALECTS["anthropic"]:       # where OpenAI's SDKs look for it
            fields["x-request-id"] = self.record.id
        if {"request-id", "x-request-id"} & self.more_headers.keys():   # not ours: it stands beside
            fields["x-agproxy-request"] = self.record.id
        fields.update(self.more_headers)
        lines = [f"{name}: {value}" for name, value in fields.items()]
        if _CONTROL.search("".join(lines)):
            lines = [_CONTROL.sub("?", line) for line in lines]
        return b"HTTP/1.1 %d %s\r\n%s\r\n\r\n" % (status, _REASONS.get(status, b"Status"),
                                                  "\r\n".join(lines).encode("latin-1", "replace"))

    def send_bytes(self, status: int, content_type: str, data: bytes,
                   headers: Mapping[str, str] | None = None) -> None:
        fields = {"content-type": content_type, "content-length": str(len(data)), **(headers or {})}
        head = self.head_bytes(status, fields)
        self.downstream.send(head if self.method == "HEAD" else head + data)

    def send_json(self, status: int, value: Any, headers: Mapping[str, str] | None = None) -> None:
        self.send_bytes(status, "application/json", json_encode(value).encode("ascii"), headers)

    def send_error(self, error: ProxyError) -> None:
        """The dialect's error body; when the head is out already, its error event, then the end."""
        if self.is_open:
            self.downstream.send(self.frame(self.fault_event(error)) + self.last_frame())
            return
        error.message = without_secrets(error.message)
        self.record.tell(f"{error.kind}: {error.message}")
        if self.is_started:
            self.keeps_alive = False
            return
        headers: dict[str, str] = {}
        is_verbatim = error.verbatim is not None and error.rule.step in (Step.CLIENT, Step.REPAIR)
        self.more_headers.update((name, value) for name, value in error.headers.items()
                                 if is_verbatim or "ratelimit" in name)
        if is_verbatim:
            status, raw, _ = error.verbatim
            self.send_bytes(status, "application/json", raw)
            return
        if error.retry_after_s is not None:
            # up to five minutes: "wait with me", at most 59 s at a time [A7]; longer: stop
            is_long = error.retry_after_s > 300
            seconds = int(error.retry_after_s + 0.999)
            headers["retry-after"] = str(max(1, seconds if is_long else min(59, seconds)))
            if is_long:
                headers["x-should-retry"] = "false"
            error.retry_at = self.services.clock.now() + error.retry_after_s
        status = error.rule.status if self.dialect.begins_early else {529: 503}.get(
            error.rule.status, error.rule.status)       # a number of Anthropic's own
        self.send_json(status, self.dialect.render_error(error, self.record.id), headers)

    # Streams: `frame` bytes for the wire, open with the first content or when the hold is over

    def render(self, delta: Any) -> str:
        return self.dialect.render_delta(self.state, delta)

    def fault_event(self, error: ProxyError) -> bytes:
        """The event that ends a stream by `error`, which is noted.  The connection goes on: its
        framing ends as any other, and a client that was promised to keep it may use it at once."""
        error.message = without_secrets(error.message)
        self.record.tell(f"{error.kind}: {error.message}")
        if error.rule.step is Step.NEXT:
            error = ProxyError(error.kind, "the answer broke off here; the next turn may go "
                               f"elsewhere: {error.message}")
        return self.render(Fault(error)).encode("ascii")

    def frame(self, data: bytes) -> bytes:
        return data if self.is_http_1_0 or not data else chunk(data)

    def last_frame(self) -> bytes:
        return b"" if self.is_http_1_0 else LAST_CHUNK

    def open_stream(self) -> bytes:
        """Head of a stream, once; later b""."""
        if self.is_open:
            return b""
        self.is_open = True
        kind = getattr(self.state, "content_type", "text/event-stream; charset=utf-8")
        fields = {"content-type": kind, "cache-control": "no-cache", "x-accel-buffering": "no"}
        if self.is_http_1_0:
            self.keeps_alive = False
        else:
            fields["transfer-encoding"] = "chunked"
        return self.head_bytes(200, fields)

    def keep_alive(self, now: float) -> bytes:
        """What a silent stream needs at monotonic `now`: b"", a ping, or a beat."""
        is_beat = now - self.last_content_at >= BEAT_EVERY_S
        if not is_beat and now - self.last_out_at < PING_EVERY_S:
            return b""
        self.last_out_at = now
        self.last_content_at = now if is_beat else self.last_content_at
        return self.frame(self.dialect.keep_alive(self.state, is_beat).encode("ascii"))

    def shown_tokens(self, count: int, model: Model) -> int:
        """Input tokens as this client is to see them."""
        if not self.scale_window:
            return count
        return self.dialect.scale(count, self.scale_window, model.context_tokens)

    # What the conductor asks of the one who waits

    def aim(self, model: Model, is_relayed: bool) -> None:
        """Told before each call: the model that is asked."""
        self.model, self.is_relayed = model, is_relayed
        if self.scale_window:
            self.state.scale = () if is_relayed else (self.scale_window, model.context_tokens)

    def wait(self, sock: socket.socket, timeout_s: float) -> None:
        """Returns when `sock` is readable.  Meanwhile opens a held stream, keeps it alive, notices
        the client's departure (ClientGone) and the deadlines (ProxyError stall or timeout)."""
        now = time.monotonic()
        config = self.services.config
        is_streaming = bool(self.request and self.request.is_streaming)
        total_s = config.total_timeout_s if is_streaming else config.unary_timeout_s
        deadline, last = now + timeout_s, self.record.started_at + total_s
        while True:
            now = time.monotonic()
            if self.services.stopping.is_set():
                raise ProxyError("stopping", "the proxy is stopping")
            held_until = float("inf")
            if is_streaming:
                held_until = (self.last_out_at + PING_EVERY_S if self.is_open
                              else self.record.started_at + HOLD_S)
            due = min(deadline, last, held_until, now + 1)      # a stop is noticed within a second
            socks = [sock, self.downstream.sock] if self.is_watching else [sock]
            ready = readable(socks, due - now)
            if self.is_watching and self.downstream.sock in ready:
                seen = self.downstream.peek()
                if seen is Peek.GONE:
                    raise ClientGone()
                self.is_watching = seen is Peek.NOTHING
            if sock in ready:
                return
            now = time.monotonic()
            if now >= last:
                raise ProxyError("timeout", f"no answer within {human_s(total_s)}")
            if now >= deadline:
                raise ProxyError("stall", f"the upstream was silent for {human_s(timeout_s)}")
            if now >= held_until:
                self._while_held(now)

    def pause(self, seconds: float) -> None:
        """Waits, for `wake` at most so long."""
        pair = socket.socketpair()
        with self._waking:
            self._waker, is_woken = pair[1], self.is_woken
        try:
            if not is_woken:        # else it was woken before there was somebody to wake
                pair[0].setblocking(False)
                self.wait(pair[0], seconds)
        except ProxyError as err:
            if err.kind != "stall":
                raise
        finally:
            with self._waking:      # nobody sends to what is closed, and may be another's by then
                self._waker, self.is_woken = None, False
            for sock in pair:
                sock.close()

    def wake(self) -> None:
        """From another thread: ends a pause, this one or the next."""
        with self._waking:
            self.is_woken = True
            if self._waker is not None:
                self._waker.send(b"\0")     # a byte or two: never blocks

    def _while_held(self, now: float) -> None:
        if self.is_open:
            out = self.keep_alive(now)
        else:       # the hold is over: open with an estimate, corrected at the end [A6]
            usage = (self.pipe.usage() if self.pipe is not None and self.pipe.is_metered else
                     Usage(input_tokens=self.services.count(self.request, self.model)))
            told = self.render(Begin(usage)) if self.dialect.begins_early else (
                self.dialect.keep_alive(self.state, False))
            out = self.open_stream() + self.frame(told.encode("ascii"))
            self.last_out_at = self.last_content_at = now
        if out:
            self.downstream.send(out)

    def keep_reply(self) -> None:
        """Before its last bytes go out: a client may go on from an answer as soon as it has it."""
        kept = self.dialect.keep and self.request and self.services.replies and (
            self.dialect.keep(self.state, self.request, self.is_relayed))
        if kept:
            self.services.replies.keep(*kept, self.body_bytes + letters_in(kept[1]["output"]))

    def report(self) -> None:
        """The request's line and counters, once it is over."""
        record, now = self.record, time.monotonic()
        self.pipe = None        # it renders by this exchange: a circle would wait for a collector
        if record.asked != "-" or record.status >= 500:
            self.services.log.request(record, now)
        elif record.note:       # a wrong path or key: why a client finds nothing here
            self.services.log.line("%s  %s %s  %s  %s", record.client, self.method,
                                   cut(self.path, 200), record.status, record.note)
        if record.asked != "-" and self.services.state is not None:
            self.services.state.put("requests", record.id, self.services.clock.now(),
                                    lambda: json_encode(request_row(record, now)))
        self.services.meters.add(requests=1, errors=record.status >= 400,
                                 retries=max(0, record.attempts - 1),
                                 input_tokens=record.input_tokens,
                                 output_tokens=record.output_tokens)


# Quotas in the form that people's scripts read

_HEALTH_WORDS = {"ready": "ok", "limited": "rate-limited", "resting": "rate-limited",
                 "soft-limited": "soft-limited", "absent": "error"}


def iso_time(epoch_s: float) -> str | None:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(epoch_s)) if epoch_s else None


def account_limits(pool: AccountPool) -> dict:
    """Each account with the binding window of each model it serves.  `email` is the label: no
    address leaves the accounts file.  An unknown fraction is null, which is not zero."""
    now, accounts, seen = pool.clock.now(), [], set()
    for account, row in pool.reports():
        limits = {}
        for model in MODELS.values():
            mine = [c for c in pool.candidates(model) if c.account is account]
            if not mine:
                continue
            verdict, least = pool.outlook(mine[0])
            if verdict.state == "stated":       # the upstream's word counts more than a reading
                least = Window("", "", 0.0, verdict.until, now)
            limits[model.id] = {
                "remaining": f"{least.fraction:.0%}" if least else None,
                "remainingFraction": least.fraction if least else None,
                "resetTime": iso_time(least.reset_at) if least else None}
        seen.update(limits)
        blocked = [r["until"] for r in row["limits"]] + [
            q["reset_at"] for q in row["quotas"] if q["fraction"] == 0 and q["reset_at"] > now]
        accounts.append({
            "email": row["name"], "provider": row["provider"], "tier": row["tier"],
            "status": _HEALTH_WORDS.get(row["state"], "invalid"), "state": row["state"],
            "error": row["reason"] or None, "lastUsed": iso_time(row["last_used_at"]),
            "isSoftLimited": row["state"] == "soft-limited", "limits": limits,
            "quotas": row["quotas"],
            "rateLimitCooldownRemaining": int(max(blocked) - now) if blocked else 0})
    return {"timestamp": iso_time(now), "totalAccounts": len(accounts), "models": sorted(seen),
            "accounts": accounts}


def deep_health(limits: dict, settings: Mapping[str, Any], took_ms: int) -> dict:
    """The rich health report: counts, and each account with its models."""
    words = [a["status"] for a in limits["accounts"]]
    counts = {"total": len(words), "available": words.count("ok"),
              "rateLimited": words.count("rate-limited"),
              "softLimited": words.count("soft-limited"),
              "invalid": words.count("invalid"), "error": words.count("error")}
    soft = settings.get("soft_limit", 0)
    models = [{name: {**row, "isSoftLimited": row["remainingFraction"] is not None
                      and row["remainingFraction"] <= soft}
               for name, row in a["limits"].items()} for a in limits["accounts"]]
    return {"timestamp": limits["timestamp"], "latencyMs": took_ms, "counts": counts,
            "summary": f"{counts['available']} of {counts['total']} accounts are available",
            "accounts": [{"error": None, **{k: v for k, v in a.items() if k not in (
                "limits", "quotas", "tier", "state")}, "models": m}
                         for a, m in zip(limits["accounts"], models)],
            "softLimit": {"enabled": bool(soft), "threshold": soft}}


def limits_table(limits: dict) -> str:
    """Two plain tables: accounts, then models by account."""
    accounts = limits["accounts"]
    counts = collections.Counter(a["status"] for a in accounts)
    told = ", ".join(f"{n} {word}" for word, n in sorted(counts.items()))
    lines = [limits["timestamp"], f"Accounts: {len(accounts)} total, {told or 'none'}", "",
             f"{'Account':20}{'Status':19}{'Last Used':22}Quota Reset"]
    for a in accounts:
        rest_s = a["rateLimitCooldownRemaining"]
        lines.append(f"{a['email'][:19]:20}{a['state']:19}{a['lastUsed'] or 'never':22}"
                     f"{'in ' + human_s(rest_s) if rest_s else '-'}")
    lines += ["", "Model".ljust(30) + "".join(a["email"][:13].ljust(14) for a in accounts)]
    for name in limits["models"]:
        cells = [(a["limits"].get(name) or {"remaining": "-"})["remaining"] or "?"
                 for a in accounts]
        lines.append(name.ljust(30) + "".join(cell.ljust(14) for cell in cells))
    return "\n".join(lines) + "\n"


# The relay

class RelayedStream:
    """An established stream between its two sockets, both non-blocking, moved by the thread of
    `relay` (the Relay below)."""

    def __init__(self, relay: Any, exchange: Exchange, stream: OpenStream):
        self.relay, self.exchange, self.stream = relay, exchange, stream
        self.client, self.upstream = exchange.downstream.sock, stream.answer.connection.sock
        self.pending = b""              # not yet taken by a slow client
        self.is_ending = self.is_over = False
        self.outcome: ProxyError | None = None
        self.last_in_at = self.stalled_at = time.monotonic()
        self.is_tls = isinstance(self.upstream, ssl.SSLSocket)
        # what only the first content needed is not kept for minutes: 5 KB of 28 for each stream
        exchange.body, exchange.headers, stream.answer.headers = b"", {}, {}
        if not exchange.dialect.keep:
            exchange.request = None

    def begin(self) -> None:
        self.relay.watch(self.upstream, selectors.EVENT_READ, self.on_upstream)
        self._watch_client()
        self.on_upstream(0)             # TLS may hold bytes that no selector sees

    def on_upstream(self, mask: int) -> None:
        """Everything that is there: one read, one write, until nothing more can be had at once."""
        answer, exchange = self.stream.answer, self.exchange
        while not (self.pending or self.is_ending or self.is_over):     # ... in the same batch
            out = answer.read()
            if out is None:
                return
            self.last_in_at = self.relay.now
            if answer.is_done or answer.fault:
                self.end(answer.fault, out)
                return
            if out:
                exchange.last_content_at = exchange.last_out_at = self.last_in_at
                out = exchange.frame(out)
                try:        # mostly all of it is taken at once
                    sent = self.client.send(out)
                except NOT_YET:
                    sent = 0
                except OSError:
                    self.finish(is_gone=True)
                    return
                if sent < len(out):
                    self.push(out[sent:])
            if not (self.is_tls and self.upstream.pending()):
                return

    def on_client(self, mask: int) -> None:
        if mask & selectors.EVENT_WRITE and not self.is_over:
            self.flush()
        if mask & selectors.EVENT_READ and not self.is_over:
            seen = self.exchange.downstream.peek()
            if seen is Peek.GONE:
                self.finish(is_gone=True)
            elif seen is Peek.MORE:
                self.exchange.is_watching = False       # a pipelined request waits for its turn
                self._watch_client()

    def push(self, data: bytes) -> None:
        if not data:
            return
        self.exchange.last_out_at = self.relay.now
        if not self.pending:
            self.stalled_at = self.relay.now
        self.pending += data
        self.flush()

    def flush(self) -> None:
        had = bool(self.pending)
        try:
            while self.pending:
                sent = self.client.send(self.pending)
                self.pending = self.pending[sent:]
                self.stalled_at = self.relay.now
        except NOT_YET:
            self._watch_client()
            # a slow client slows its upstream
            self.relay.watch(self.upstream, 0, self.on_upstream)
            return
        except OSError:
            self.finish(is_gone=True)
            return
        if self.is_ending:
            self.finish()
        elif had and self.relay.events_of(self.upstream) == 0:
            self.relay.watch(self.upstream, selectors.EVENT_READ, self.on_upstream)
            self._watch_client()
            self.on_upstream(0)

    def end(self, error: ProxyError | None, out: bytes = b"") -> None:
        """The last bytes: what came, an error event where it failed, the framing's end."""
        if self.is_ending:
            return
        self.is_ending, self.outcome = True, error
        self.exchange.keep_reply()
        if error is not None:
            out += self.exchange.fault_event(error)
        last = self.exchange.frame(out) + self.exchange.last_frame()
        if last:
            self.push(last)
        else:
            self.finish()

    def fail(self) -> None:
        """Something inside the proxy broke: an error event where that still works, then the end."""
        if self.is_ending:
            self.finish(is_gone=True)
        else:
            self.end(ProxyError("internal", "the stream failed inside the proxy"))

    def tick(self, now: float) -> None:
        """Once a second: keep-alives, a dead upstream, a client that takes nothing, total time."""
        config = self.exchange.services.config
        if self.pending:
            if now - self.stalled_at > SEND_STALL_S:
                self.finish(is_gone=True)
        elif now - self.last_in_at > config.idle_timeout_s:
            self.end(ProxyError("stall",
                                f"the upstream was silent for {human_s(config.idle_timeout_s)}"))
        elif now - self.exchange.record.started_at > config.total_timeout_s:
            self.end(ProxyError("timeout", f"no end within {human_s(config.total_timeout_s)}"))
        else:
            self.push(self.exchange.keep_alive(now))

    def finish(self, is_gone: bool = False) -> None:
        """Lets go of both sockets; the client's connection goes on to its next request."""
        if self.is_over:
            return
        self.is_over, exchange = True, self.exchange
        self.relay.forget(self)
        if is_gone:
            exchange.record.note = exchange.record.note or "client left"
        self.stream.close(self.outcome, is_gone)
        exchange.report()
        if is_gone or not exchange.keeps_alive:
            self.relay.release(exchange.downstream)
        else:
            self.relay.resume(exchange.downstream)

    def _watch_client(self) -> None:
        events = selectors.EVENT_READ if self.exchange.is_watching else 0
        self.relay.watch(self.client, events | (selectors.EVENT_WRITE if self.pending else 0),
                         self.on_client)


class Relay:
    """One thread, one selector: moves all established streams and watches idle connections.  Only
    its thread touches selector, streams and idle; others put calls into the inbox and wake it.  A
    call leaves the inbox when it is done, so that a stream is always in one of the two."""

    def __init__(self, services: Services, serve: Callable[[Downstream], None],
                 release: Callable[[Downstream], None], each_second: Callable[[float], None]):
        self.services, self.serve, self.release = services, serve, release
        self.each_second = each_second
        self.streams: set[RelayedStream] = set()
        self.idle: dict[Downstream, float] = {}         # -> deadline, monotonic
        self.now = time.monotonic()     # as of the last wake-up: read once for all its events
        self._round: list[RelayedStream] = []           # streams whose turn to be looked at is near
        self._selector = selectors.DefaultSelector()
        self._inbox: collections.deque = collections.deque()
        # selectors on Windows take sockets only
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._selector.register(self._wake_in, selectors.EVENT_READ, self._woken)
        self._is_stopping = False
        self.thread = threading.Thread(target=self._run, name="relay", daemon=True)
        self.thread.start()

    # From other threads

    def adopt(self, exchange: Exchange, stream: OpenStream) -> None:
        self._call(self._adopt, exchange, stream)

    def park(self, downstream: Downstream, seconds: float) -> None:
        self._call(self._park, downstream, seconds)

    def is_busy(self) -> bool:
        """Whether it has streams, or may soon; the inbox is looked at first."""
        return bool(self._inbox or self.streams)

    def end_all(self, error: ProxyError) -> None:
        self._call(lambda: [stream.end(error) for stream in list(self.streams)])

    def stop(self) -> None:
        self._is_stopping = True
        self._call(lambda: None)
        self.thread.join(5)
        self._selector.close()
        self._wake_in.close()
        self._wake_out.close()

    def _call(self, *call: Any) -> None:
        self._inbox.append(call)
        with contextlib.suppress(BlockingIOError, OSError):     # a full pipe wakes as well
            self._wake_out.send(b"\0")

    # In the relay's thread

    def watch(self, sock: socket.socket, events: int, callback: Any) -> None:
        """Registers, changes or removes (events 0) what is waited for on a socket."""
        known = self._selector.get_map().get(sock) if sock.fileno() >= 0 else None
        if known is None:
            if events:
                self._selector.register(sock, events, callback)
        elif not events:
            self._selector.unregister(sock)
        elif known.events != events:
            self._selector.modify(sock, events, callback)

    def events_of(self, sock: socket.socket) -> int:
        known = self._selector.get_map().get(sock)
        return known.events if known else 0

    def forget(self, stream: RelayedStream) -> None:
        """Its sockets are no longer watched."""
        self.streams.discard(stream)
        self.watch(stream.upstream, 0, None)
        self.watch(stream.client, 0, None)

    def resume(self, downstream: Downstream) -> None:
        if downstream.buffer:       # a pipelined request is here already
            self.serve(downstream)
            return
        self._park(downstream, self.services.config.client_idle_timeout_s)

    def _adopt(self, exchange: Exchange, stream: OpenStream) -> None:
        relayed = RelayedStream(self, exchange, stream)
        self.streams.add(relayed)
        self._guard([(relayed.begin,)])

    def _park(self, downstream: Downstream, seconds: float) -> None:
        self.idle[downstream] = time.monotonic() + seconds
        self.watch(downstream.sock, selectors.EVENT_READ, lambda mask: self._wake(downstream))

    def _wake(self, downstream: Downstream) -> None:
        self.watch(downstream.sock, 0, None)
        if self.idle.pop(downstream, None) is not None:
            self.serve(downstream)

    def _woken(self, mask: int) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wake_in.recv(4096)

    def _guard(self, calls: Iterable[tuple]) -> None:
        """Makes each of the calls; an exception in one stream ends that one only."""
        for action, *values in calls:
            try:
                action(*values)
            except Exception as err:
                self.services.log.line("relay: %s", short_trace(err))
                stream = getattr(action, "__self__", None)
                if isinstance(stream, RelayedStream) and action != stream.fail:
                    self._guard([(stream.fail,)])

    def _run(self) -> None:
        next_tick = next_look = time.monotonic() + 1
        while not self._is_stopping:
            due = min(next_tick, next_look) if self.streams else next_tick
            try:
                ready = self._selector.select(max(0.0, due - time.monotonic()))
            except (OSError, ValueError) as err:    # more sockets than select() takes
                self.services.log.line("relay: %s", short_trace(err))
                ready = []
                time.sleep(0.05)
            self.now = now = time.monotonic()
            self._guard([(key.data, mask) for key, mask in ready])
            while self._inbox:
                self._guard([self._inbox[0]])
                self._inbox.popleft()       # not before it is done: a drain looks for it here
            if now >= next_look:
                next_look = now + 1 / LOOKS_PER_S
                self._look(now)
            if now >= next_tick:
                next_tick = now + 1
                self._guard([(self._tick, now)])

    def _look(self, now: float) -> None:
        """The tick of a share of the streams: all at once, a thousand would stall everybody's
        events for 5 ms each second."""
        self._round = self._round or list(self.streams)
        for _ in range(-(-len(self.streams) // LOOKS_PER_S)):
            stream = self._round.pop() if self._round else None
            if stream is not None and not stream.is_over:
                self._guard([(stream.tick, now)])

    def _tick(self, now: float) -> None:
        self.each_second(now)
        for downstream in [d for d, deadline in self.idle.items() if deadline < now]:
            del self.idle[downstream]
            self.watch(downstream.sock, 0, None)
            self.release(downstream)


class Seat:
    """Where a thread waits for a connection: its lock is freed when one is there."""
    __slots__ = ("lock", "job")

    def __init__(self):
        self.lock, self.job = threading.Lock(), None
        self.lock.acquire()


class Workers:
    """Threads that serve connections: a few wait, more start when needed, at most `limit`.  Who
    worked last works next, so that those of a crowd that is over end.  The lock guards the rest."""

    def __init__(self, limit: int, work: Callable[[Downstream], None]):
        self.limit, self.work = limit, work
        self.threads = 0
        self._lock = threading.Lock()
        self._idle: list[Seat] = []         # the newest last
        self._jobs: collections.deque = collections.deque()     # (since monotonic, Downstream)

    def submit(self, downstream: Downstream) -> None:
        with self._lock:
            if self._idle:
                seat = self._idle.pop()
                seat.job = downstream
                seat.lock.release()
                return
            if self.threads >= self.limit:
                self._jobs.append((time.monotonic(), downstream))
                return
            self.threads += 1
        threading.Thread(target=self._run, args=(downstream,), name="worker", daemon=True).start()

    def overdue(self, now: float) -> list[Downstream]:
        """Connections for which no thread was free for two seconds; they are no jobs any more."""
        out = []
        with self._lock:
            while self._jobs and now - self._jobs[0][0] > THREAD_WAIT_S:
                out.append(self._jobs.popleft()[1])
        return out

    def _run(self, downstream: Downstream | None) -> None:
        while downstream is not None:
            self.work(downstream)
            downstream = None       # not held while waiting
            downstream = self._next()

    def _next(self) -> Downstream | None:
        """The next connection, None where the thread is no longer needed."""
        with self._lock:
            if self._jobs:
                return self._jobs.popleft()[1]
            seat = Seat()
            self._idle.append(seat)
        if not seat.lock.acquire(timeout=THREAD_IDLE_S):
            with self._lock:
                if seat.job is None:        # else it came in the last moment
                    self._idle.remove(seat)
                    self.threads -= 1
        return seat.job


# Routes

class Access(NamedTuple):
    """What a class of routes asks of whoever calls."""
    needs_key: bool = True      # where there is one
    by_any_name: bool = False   # a right key is enough under any Host: a rebound page has none
    is_owners: bool = False     # the owner's key, from this machine; state is changed by JSON only


ACCESS = {"public": Access(needs_key=False), "api": Access(by_any_name=True),
          "admin": Access(is_owners=True)}


class Route(NamedTuple):
    methods: str
    pattern: Any            # of the raw path, whole
    access: Any             # the name of a row of ACCESS; in ROUTES that row
    handle: Callable[[Any, Exchange, Any], Any]     # (handler, exchange, match of the path)


OWNER = UserKey("", "", admin=True)     # who brings PROXY_API_KEY
WRONG_KEYS = 20                 # then one a second is looked at
MOST_KNOWN_KEYS = 1000


class KeyGuard:
    """Tells whose key a request brings, and slows guessing.  A right key always passes: the
    owner's is compared first, a user's is hashed where its end fits a hint, and known after
    that by a keyed hash.  The lock guards what is counted and known; `_slow` admits one hashing
    at a time."""

    def __init__(self, services: Services):
        self.services = services        # its configuration may change at any time
        self._lock, self._slow = threading.Lock(), threading.Lock()
        self._wrong, self._next_at = 0, 0.0
        self._salt, self._users = os.urandom(16), ()
        self._known: dict[bytes, UserKey] = {}

    def check(self, given: Iterable[str], now: float) -> UserKey | None:
        """Whose key is among `given`, None where nobody needs one.  Raises ProxyError
        authentication or locked_out."""
        config = self.services.config
        if not (config.api_key or config.users):
            return None
        keys = [key.encode("utf-8", "replace") for key in given if key]
        if config.api_key and any([hmac.compare_digest(k, config.api_key.encode()) for k in keys]):
            return OWNER
        for key in keys if config.users else ():
            user = self._user_of(key, config.users, now)
            if user is not None:
                return user
        with self._lock:
            if keys:
                self._wrong += 1
                if self._wrong > WRONG_KEYS and now < self._next_at:
                    raise ProxyError("locked_out", "too many wrong keys", 1)
                self._next_at = now + 1
        # Claude Code looks for "x-api-key" in it
        raise ProxyError("authentication", "invalid x-api-key: this proxy wants its PROXY_API_KEY, "
                         "as x-api-key, x-goog-api-key or Authorization: Bearer")

    def _user_of(self, key: bytes, users: tuple[UserKey, ...], now: float) -> UserKey | None:
        mark = hmac.new(self._salt, key, "sha256").digest()
        with self._lock:
            if self._users is not users or len(self._known) > MOST_KNOWN_KEYS:
                self._users, self._known = users, {}
            user = self._known.get(mark)
            is_slowed = self._wrong >= WRONG_KEYS and now < self._next_at
        if user is None:
            fits = [u for u in users if key.endswith(u.hint.encode()) and (
                u.hint or not is_slowed)]
            user = next((u for u in fits if self._is_key_of(key, u)), None)
            if user is not None:
                remember_secret(key.decode("utf-8", "replace"))
                with self._lock:
                    self._known[mark] = user
        is_over = user is not None and 0 < user.expires_at < self.services.clock.now()
        return None if is_over else user

    def _is_key_of(self, key: bytes, user: UserKey) -> bool:
        _, salt, told = user.key_hash.split(":")
        with self._slow:
            made = hashlib.scrypt(key, salt=bytes.fromhex(salt), n=16384, r=8, p=1, dklen=32)
        return hmac.compare_digest(made.hex(), told)


def keys_of(exchange: Exchange) -> list[str]:
    """Every credential a request brings; a query's only where Google's own API takes it."""
    headers = exchange.headers
    scheme, _, token = headers.get("authorization", "").partition(" ")
    given = [headers.get("x-api-key", ""), headers.get("x-goog-api-key", ""),
             token.strip() if scheme.lower() == "bearer" else ""]
    if "key=" in exchange.query and exchange.dialect is DIALECTS["gemini"]:
        given += [v for name, v in urllib.parse.parse_qsl(exchange.query) if name == "key"]
    return given


def is_loopback(address: str) -> bool:
    """Whether a peer's address is of this machine, as an IPv6 listener tells it too."""
    import ipaddress
    found = ipaddress.ip_address(address.partition("%")[0])
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback


LOOPBACK_NAMES = ("127.0.0.1", "localhost", "[::1]")
_HOST = re.compile(r"(?s)(.*?)(?::([0-9]{1,5}))?")


class Handler:
    """Serves one connection of `server` (the ProxyServer below) while it has requests: reads,
    checks, routes, answers.  Every exception ends as one error in the caller's dialect, or in
    silence when the client is gone."""

    def __init__(self, server: Any, downstream: Downstream):
        self.server, self.services, self.downstream = server, server.services, downstream

    def run(self) -> None:
        """Requests of this connection until it idles (back to the relay), is handed over, ends."""
        downstream = self.downstream
        while not downstream.is_closed:
            try:
                exchange = self._read_request()
                if exchange is None:
                    return
                with self.server.counted():
                    is_handed_over = self._answer(exchange)
            except ClientGone:
                self.server.release(downstream)
                return
            except ProxyError as err:       # before a request could be understood
                self._refuse_damaged(err)
                return
            if is_handed_over:
                return
            if not exchange.keeps_alive or self.server.is_stopping:
                self.server.release(downstream, linger=True)
                return
            del exchange        # with its body and all that was made of it
            if not downstream.buffer and not readable([downstream.sock], KEPT_BY_THREAD_S):
                self.server.relay.park(downstream, self.services.config.client_idle_timeout_s)
                return

    # Reading

    def _read_request(self) -> Exchange | None:
        """The next request with its body; None when the connection ended between requests."""
        downstream, config = self.downstream, self.services.config
        deadline = time.monotonic() + config.client_head_timeout_s
        data = downstream.buffer
        while data.startswith(b"\r\n"):
            data = data[2:]
        while b"\r\n\r\n" not in data:
            if b"\r\n" not in data and len(data) > MAX_LINE_BYTES:
                raise ProxyError("line_too_long",
                                 f"a request line of more than {MAX_LINE_BYTES} bytes")
            if len(data) > MAX_HEAD_BYTES:
                raise ProxyError("head_too_large", f"a head of more than {MAX_HEAD_BYTES} bytes")
            more = downstream.receive(deadline, "the request's head")
            if not more:
                self.server.release(downstream)
                return None
            data = (data + more).lstrip(b"\r\n") if not data else data + more
        raw, _, downstream.buffer = data.partition(b"\r\n\r\n")
        if len(raw) > MAX_HEAD_BYTES:
            raise ProxyError("head_too_large", f"a head of more than {MAX_HEAD_BYTES} bytes")
        head = parse_head(raw, True)
        line = parse_request_line(head.first)
        if "host" not in head.headers and not line.is_http_1_0:
            raise invalid("", "a Host header is required")
        if line.is_http_1_0 and "transfer-encoding" in head.headers:
            raise invalid("", "HTTP/1.0 has no Transfer-Encoding")
        return Exchange(downstream, self.services, line, head.headers)

    def _read_body(self, exchange: Exchange, limit: int) -> None:
        """The whole body, within its limits."""
        config, headers, downstream = self.services.config, exchange.headers, self.downstream
        encoding = headers.get("content-encoding", "identity").lower()
        if encoding not in ("identity", "gzip", "x-gzip", "deflate"):
            raise ProxyError("media_type", f"Content-Encoding {encoding[:40]!r} is not supported")
        too_large = ProxyError("too_large", f"the body is larger than {limit} bytes")
        try:
            framing = body_framing(headers, True)
            if isinstance(framing, int) and framing > limit:
                raise too_large
            if framing and headers.get("expect", "").lower() == "100-continue":
                downstream.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            body = BodyReader(framing, limit, encoding, True)
            parts, data, received, armed_at = [], downstream.buffer, 0, 0
            deadline = time.monotonic() + config.client_body_timeout_s
            while True:
                if data:
                    parts.append(body.feed(data))
                if body.done:
                    break
                if received - armed_at >= RECV_BYTES:   # each 64 KiB earn a fresh deadline
                    deadline, armed_at = time.monotonic() + config.client_body_timeout_s, received
                data = downstream.receive(deadline, "the request's body")
                received += len(data)
                if not data:
                    raise ClientGone()
        except OverflowError:
            raise too_large from None
        except ValueError as err:
            raise invalid("", str(err)) from None
        downstream.buffer = body.rest if parts or framing else downstream.buffer
        exchange.body = b"".join(parts)
        exchange.body_bytes = len(exchange.body)

    def _refuse_damaged(self, error: ProxyError) -> None:
        """An answer to bytes that are no request; the connection cannot be trusted after it."""
        line = RequestLine("GET", "/", "", False)
        exchange = Exchange(self.downstream, self.services, line, {"connection": "close"})
        with contextlib.suppress(ClientGone):
            exchange.send_error(error)
        self.server.release(self.downstream, linger=True)

    # Checking and routing

    def _answer(self, exchange: Exchange) -> bool:
        """Whether the answer was handed over to the relay; else it is over, and reported."""
        try:
            is_handed_over = self._respond(exchange)
        except ClientGone:
            exchange.record.note = exchange.record.note or "client left"
            exchange.report()
            raise
        if not is_handed_over:
            exchange.report()
        return is_handed_over

    def _respond(self, exchange: Exchange) -> bool:
        # an unread body would be taken for a request: until it is read, every error closes
        keeps_alive, exchange.keeps_alive = exchange.keeps_alive, False
        try:
            route, match = self._find_route(exchange)
            self._admit(exchange, route.access)
            limit = self.services.config.max_body_bytes
            self._read_body(exchange, limit if route.access.needs_key
                            else min(limit, MAX_PUBLIC_BODY_BYTES))
            exchange.keeps_alive = keeps_alive
            return bool(route.handle(self, exchange, match))
        except ProxyError as err:
            exchange.send_error(err)
        except ClientGone:
            raise
        except RecursionError:
            exchange.send_error(invalid("", "the body is nested too deeply"))
        except Exception as err:
            self.services.log.line("%s failed: %s", exchange.record.id, short_trace(err))
            exchange.send_error(ProxyError("internal",
                                           "the proxy failed on this request; its log says why"))
        return False

    def _find_route(self, exchange: Exchange) -> tuple[Route, Any]:
        allowed: list[str] = []
        for route in self.server.routes:
            match = route.pattern.fullmatch(exchange.path)
            if match and exchange.method in route.methods.split():
                return route, match
            allowed += route.methods.split() if match and route.methods != "OPTIONS" else []
        if allowed:
            methods = ", ".join(dict.fromkeys(allowed))
            exchange.more_headers["allow"] = methods
            raise ProxyError("method", f"{exchange.method} is not allowed here; {methods} is")
        raise ProxyError("not_found", f"{cut(exchange.path, 200)} is not a route of this proxy")

    def _admit(self, exchange: Exchange, access: Access) -> None:
        """Origin, key, Host.  The first and the last protect a keyless loopback from web pages: any
        page can send a simple POST to it, or be rebound to its address."""
        headers, config, server = exchange.headers, self.services.config, self.server
        origin = headers.get("origin", "")
        if origin and origin not in server.own_origins:
            if origin not in config.cors_origins:
                raise ProxyError("forbidden", "requests from this web origin are not allowed; add "
                                 "it to settings.cors_origins")
            exchange.cors_origin = origin
        elif headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            raise ProxyError("forbidden", "requests from other web sites are not allowed")
        if access.needs_key:
            exchange.user = server.guard.check(keys_of(exchange), time.monotonic())
        host = headers.get("host", "").lower()
        name, port = _HOST.fullmatch(host).groups()
        is_own = (name in LOOPBACK_NAMES and (not port or int(port) == server.server_port)
                  or not host and exchange.is_http_1_0      # no browser speaks it
                  or name in map(str.lower, config.hosts))
        exchange.is_stranger = not (is_own or access.by_any_name and exchange.user)
        is_probe = exchange.path == "/health" and not exchange.query
        if exchange.is_stranger and not is_probe:
            raise ProxyError("forbidden", "this Host name is not served; add it to settings.hosts")
        if access.is_owners:
            self._admit_owner(exchange)

    def _admit_owner(self, exchange: Exchange) -> None:
        if not is_loopback(self.downstream.sock.getpeername()[0]):
            raise ProxyError("forbidden", "this is answered on the proxy's own machine only")
        if exchange.user is None or not exchange.user.admin:
            raise ProxyError("authentication", "this needs the owner's key, PROXY_API_KEY")
        kind = exchange.headers.get("content-type", "").partition(";")[0].strip().lower()
        if exchange.method not in ("GET", "HEAD") and kind != "application/json":
            raise ProxyError("media_type", "Content-Type: application/json is required")

    # Routes

    def generate(self, exchange: Exchange, match: Any, dialect: str) -> bool:
        exchange.dialect = DIALECTS[dialect]
        request = self.parse(exchange, False)
        model = self._local_model(request)
        if model is not None:
            exchange.aim(model, False)
            self._reply_locally(exchange, request)
            return False
        request = self._routed(exchange, request)
        conducting = Conducting(self.services, request, exchange, exchange.record)
        try:
            answer = conducting.run(fold=not request.is_streaming)
        except ProxyError as err:
            if err.kind != "no_search":
                raise
            answer = self._no_search(exchange, err)
        if isinstance(answer, tuple):
            return self._stream(exchange, *answer)
        self._reply_whole(exchange, answer)
        return False

    def _routed(self, exchange: Exchange, request: Request) -> Request:
        """The request under the name that the owner's routes say; what nobody serves stays."""
        name, why = route_for(request, exchange.headers, self.services.config,
                              lambda: self.services.count(request, exchange.model))
        if not name or not self._serves(name):
            if name:
                exchange.record.tell(f"not routed: {why} says {name}, which no account serves")
            return request
        exchange.record.tell(f"routed: {why}" + (f", {request.small}" if request.small else ""))
        return as_variant(replace(request, model=name, wanted=name, routed=why), name)

    def _serves(self, name: str) -> bool:
        with contextlib.suppress(ProxyError):       # nobody knows the name
            return bool(self.services.candidates(name))
        return False

    def _no_search(self, exchange: Exchange, error: ProxyError) -> Reply:
        """A search that nobody can do: an error of its tool, never an empty success."""
        request = exchange.request
        name, call_id = request.search.tool, new_id("srvtoolu_agp")
        asked = next((b.text for t in reversed(request.turns) for b in t.blocks
                      if isinstance(b, Text)), "")
        usage = Usage(self.services.count(request, exchange.model), output_tokens=1)
        return Reply((ServerCall(call_id, name, {"query": asked[:200]}),
                      Found(call_id, name, (), "unavailable"), Text(error.message)),
                     Finish(Stop.END, usage))

    def _local_model(self, request: Request) -> Model | None:
        """The model in whose name a request is answered here, None where a real one is needed:
        probes, warm-ups, and what asks for no token need none; an upstream of the client's own
        language fills its cache by the latter."""
        if request.refusal is not None or not (request.small in ("probe", "warmup")
                                               or request.max_tokens == 0):
            return None
        services = self.services
        candidates = services.candidates(request.model, request.wanted)
        if request.max_tokens == 0:
            is_local = not any(request.is_native_to(c.provider) for c in candidates)
        else:       # where nobody can serve, the refusal is the better answer
            is_local = any(v.state != "stopped" for v in services.pool.verdicts(candidates, ()))
        return (candidates[0].model if candidates else Exchange.model) if is_local else None

    def _reply_locally(self, exchange: Exchange, request: Request) -> None:
        kind = request.small or "warmup"
        exchange.more_headers["x-agproxy-local"] = kind
        exchange.record.note = f"answered locally: {kind}"
        self.services.meters.add(saved=1)
        usage = Usage(self.services.count(request, exchange.model),
                      output_tokens=min(1, request.max_tokens))
        stop = Stop.LENGTH if request.max_tokens < 2 else Stop.END
        blocks = (Text("OK"),) if request.max_tokens else ()
        self._reply_whole(exchange, Reply(blocks, Finish(stop, usage)))

    def named_model(self, name: str) -> Model:
        """The model that a name means here; raises ProxyError not_found."""
        return self.services.plan(name.rpartition("models/")[2] or name).models[0]

    def parse(self, exchange: Exchange, is_count: bool) -> Request:
        try:
            body = BODIES.decode(exchange.body)
        except ValueError as err:
            raise invalid("", f"the body is not valid JSON: {err}") from None
        known: dict = {}
        if exchange.dialect.recall and self.services.replies:
            body, known = exchange.dialect.recall(body, self.services.replies.get)
        request = exchange.dialect.parse_request(
            body, exchange.headers, is_count=is_count, raw=exchange.body, query=exchange.query,
            path=exchange.path)
        if known:
            echo = {**request.ext["echo"], "previous_response_id": known.get("previous")}
            request = replace(request, ext={**request.ext, **known, "echo": echo})
        config = self.services.config
        if request.small and (exchange.headers.get("x-agproxy-small") == "off"
                              or request.small not in config.small_requests):
            request = replace(request, small="")
        exchange.request = request
        may_ask = exchange.user.models if exchange.user else ()
        if may_ask and not any(fnmatch.fnmatchcase(request.model.lower(), p) for p in may_ask):
            raise ProxyError("forbidden", f"this key may not ask for {request.model[:80]}; it may "
                             f"ask for {', '.join(may_ask)}")
        record = exchange.record
        record.asked, record.session = cut(request.model, 80), request.conversation[:12]
        record.agent, record.parent = cut(request.agent, 80), cut(request.parent, 80)
        exchange.state = exchange.dialect.answer_state(request, int(time.time()))
        if config.usage_scaling and exchange.dialect.scale:
            exchange.scale_window = config.client_window_tokens or request.window_tokens
        return request

    def _reply_whole(self, exchange: Exchange, reply: Reply | bytes) -> None:
        exchange.record.first_byte_at = time.monotonic()
        if isinstance(reply, bytes):
            exchange.keep_reply()
            exchange.send_bytes(200, "application/json", reply)
        elif exchange.request.is_streaming:     # a stream that needs no upstream
            out = "".join(map(exchange.render, deltas_of(reply))).encode("ascii")
            head = exchange.open_stream()
            exchange.downstream.send(head + exchange.frame(out) + exchange.last_frame())
        else:
            whole = exchange.dialect.render_reply(exchange.state, reply)
            exchange.keep_reply()
            exchange.send_json(200, whole)

    def _stream(self, exchange: Exchange, stream: OpenStream, out: bytes) -> bool:
        """Sends what is there; an answer that is still going on is handed over."""
        answer = stream.answer
        exchange.record.first_byte_at = time.monotonic()
        error = answer.fault
        if error is not None:
            out += exchange.fault_event(error)
        is_over = answer.is_done or error is not None
        if is_over:
            exchange.keep_reply()
        data = exchange.open_stream() + exchange.frame(out)
        try:
            exchange.downstream.send(data + exchange.last_frame() if is_over else data)
        except ClientGone:
            stream.close(is_gone=True)
            raise
        exchange.last_out_at = exchange.last_content_at = time.monotonic()
        if is_over:
            stream.close(error)
            return False
        self.server.relay.adopt(exchange, stream)
        return True


# Answers to single routes: (handler, exchange, match of the path)

def answer_count_tokens(handler: Handler, exchange: Exchange, match: Any,
                        dialect: str = "anthropic") -> None:
    exchange.dialect = DIALECTS[dialect]
    services, request = handler.services, handler.parse(exchange, True)
    models, candidates, _ = services.plan(request.model, request.wanted)
    exchange.record.asked = "-"         # clients send these by the dozen: not worth a line
    count = count_upstream(services, request)
    how = "upstream" if count is not None else "estimate"
    is_native = bool(candidates) and request.is_native_to(candidates[0].provider)
    if count is None:
        if request.refusal is not None and not is_native:
            raise request.refusal
        count = services.count(request, models[0])
    shown = count if is_native else exchange.shown_tokens(count, models[0])
    exchange.send_json(200, exchange.dialect.render_count(shown), {"x-agproxy-token-count": how})


def answer_no_socket(handler: Handler, exchange: Exchange, match: Any) -> None:
    """Codex goes on over HTTP where WebSockets are refused so."""
    exchange.send_json(426 if "upgrade" in exchange.headers else 405, openai_render_error(
        ProxyError("method", "responses are served over HTTP, by POST"), exchange.record.id),
        {"allow": "POST"})


def answer_response(handler: Handler, exchange: Exchange, match: Any) -> None:
    raise ProxyError("not_found", f"{match['id'][:80]}: responses are kept to go on from, not to "
                     "be read again")


def send_models(handler: Handler, exchange: Exchange, name: str | None, member: str,
                render: Callable[[Model], dict], label: str, query: Mapping[str, str]) -> None:
    """One row or all; `pageSize` and `pageToken` cut pages out of them."""
    if name:
        name = urllib.parse.unquote(name)[:MAX_MODEL_NAME]
        row = render(handler.named_model(name))
        exchange.send_json(200, {**row, label: row[label] if label == "name" else name})
        return
    rows = [render(model) for model, _ in handler.server.listed()]
    size, start = query.get("pageSize", "1000"), query.get("pageToken", "0")
    if not re.fullmatch(r"[1-9]\d{0,3}", size) or not re.fullmatch(r"\d{1,6}", start):
        raise invalid("pageSize", "whole numbers are required")
    page = rows[int(start):int(start) + int(size)]
    more = {"nextPageToken": str(int(start) + len(page))} if int(start) + len(page) < len(
        rows) else {}
    exchange.send_json(200, {**({"object": "list"} if member == "data" else {}), member: page,
                             **more})


def anthropic_models(handler: Handler, exchange: Exchange, match: Any) -> None:
    rows = handler.server.model_rows()
    if match["id"]:
        name = urllib.parse.unquote(match["id"])[:MAX_MODEL_NAME]
        row = next((r for r in rows if r["id"] == name), None)
        if row is None:
            row = {**anthropic_render_model(handler.named_model(name)), "id": name}
        exchange.send_json(200, row)
        return
    query = dict(urllib.parse.parse_qsl(exchange.query))
    limit = query.get("limit", "20")
    after, before = query.get("after_id"), query.get("before_id")
    if not re.fullmatch(r"\d{1,4}", limit) or not 1 <= int(limit) <= 1000:
        raise invalid("limit", "a whole number from 1 to 1000 is required")
    if after and before:
        raise invalid("after_id", "cannot be combined with before_id")
    ids, size = [r["id"] for r in rows], int(limit)
    for name, value in (("after_id", after), ("before_id", before)):
        if value and value not in ids:
            raise invalid(name, f"{value!r} is not in the list")
    start = ids.index(after) + 1 if after else 0
    end = ids.index(before) if before else len(ids)
    page = rows[max(start, end - size):end] if before else rows[start:min(end, start + size)]
    has_more = end - size > 0 if before else start + size < end
    exchange.send_json(200, {"data": page, "has_more": has_more,
                             "first_id": page[0]["id"] if page else None,
                             "last_id": page[-1]["id"] if page else None})


def answer_models(handler: Handler, exchange: Exchange, match: Any) -> None:
    """The list in the shape of who asks."""
    query = dict(urllib.parse.parse_qsl(exchange.query))
    is_gemini = exchange.path.startswith("/v1beta") and "/openai/" not in exchange.path or (
        "x-goog-api-key" in exchange.headers)
    is_anthropic = "anthropic-version" in exchange.headers or exchange.headers.get(
        "user-agent", "").startswith(("claude", "anthropic", "Anthropic"))
    if "client_version" in query:
        rows = [codex_render_model(m, n) for n, (m, _) in enumerate(handler.server.listed())]
        body = json_encode({"models": rows}).encode("ascii")
        tag = f'"{zlib.crc32(body):08x}"'
        exchange.send_bytes(200, "application/json", body, {"etag": tag})
    elif is_gemini:
        exchange.dialect = DIALECTS["gemini"]
        send_models(handler, exchange, match["id"], "models", gemini_render_model, "name", query)
    elif is_anthropic:
        anthropic_models(handler, exchange, match)
    else:
        exchange.dialect = DIALECTS["chat"]
        send_models(handler, exchange, match["id"], "data", functools.partial(
            openai_render_model, created=int(handler.server.services.clock.now())), "id", {})


def answer_root(handler: Handler, exchange: Exchange, match: Any) -> None:
    exchange.send_json(200, {"name": "agproxy", "version": VERSION})


def answer_health(handler: Handler, exchange: Exchange, match: Any) -> None:
    server, services = handler.server, handler.services
    if exchange.is_stranger:        # a web page may have been rebound to it
        exchange.send_json(200, {"status": "ok"})
        return
    report = {"status": "ok", "version": VERSION, "pid": os.getpid(), "workers": services.workers,
              "uptime_s": int(time.monotonic() - server.started_at),
              "streams": len(server.relay.streams), "threads": server.workers.threads,
              **services.meters.snapshot()}
    if "deep=1" in exchange.query.split("&"):
        server.guard.check(keys_of(exchange), time.monotonic())
        began = time.monotonic()
        limits = account_limits(services.pool)
        took_ms = int((time.monotonic() - began) * 1000)
        report.update(deep_health(limits, services.config.settings, took_ms))
    exchange.send_json(200, report)


def answer_account_limits(handler: Handler, exchange: Exchange, match: Any) -> None:
    limits = account_limits(handler.services.pool)
    if "includeHistory=true" in exchange.query.split("&"):
        limits["history"] = handler.services.pool.history()
    if "format=table" in exchange.query.split("&"):
        exchange.send_bytes(200, "text/plain; charset=utf-8", limits_table(limits).encode())
    else:
        exchange.send_json(200, limits)


def answer_refresh_token(handler: Handler, exchange: Exchange, match: Any) -> None:
    """A new access token for every account that has a refresh token."""
    services, results = handler.services, {}
    for account in services.pool.accounts:
        if account.credential != "refresh_token":
            continue
        try:
            if services.pool.is_stopped(account):
                raise ProxyError("revoked", "stopped until a person acts")
            services.tokens.access(account, account.access_token, is_shared=False)
            results[account.label] = "refreshed"
        except ProxyError as err:
            results[account.label] = redact(err.message)
    failed = sum(1 for text in results.values() if text != "refreshed")
    exchange.send_json(502 if failed and failed == len(results) else 200, {
        "status": "error" if failed else "ok", "accounts": results,
        "message": f"{len(results) - failed} of {len(results)} tokens refreshed"})


def answer_discard(handler: Handler, exchange: Exchange, match: Any) -> None:
    """Telemetry that clients aim at their base URL; it goes nowhere."""
    exchange.send_json(200, {})


def answer_not_offered(handler: Handler, exchange: Exchange, match: Any) -> None:
    raise ProxyError("not_found", f"{exchange.path[:60]} is not offered by this proxy")


def answer_preflight(handler: Handler, exchange: Exchange, match: Any) -> None:
    headers = {"content-length": "0"}
    if exchange.cors_origin:
        headers.update({"access-control-allow-methods": "GET, POST, OPTIONS",
                        "access-control-allow-headers": exchange.headers.get(
                            "access-control-request-headers", "*"),
                        "access-control-max-age": "600"})
    exchange.downstream.send(exchange.head_bytes(204, headers))


GEMINI_PATH = r"/v1(?:beta\w*)?(?:/publishers/google|/projects/[^/]+/.+)?/(?:models|tunedModels)/.+"
ROUTES = tuple(r._replace(pattern=re.compile(r.pattern), access=ACCESS[r.access]) for r in (
    # first row that matches; `/v1` twice or a vendor prefix come from base URLs people set
    Route("POST", r"(/v1|/anthropic)?(/v1)?/messages", "api",
          functools.partial(Handler.generate, dialect="anthropic")),
    Route("POST", r"(/v1|/anthropic)?(/v1)?/messages/count_tokens", "api", answer_count_tokens),
    Route("POST", r"(/v1|/v1beta)?(/v1|/openai)?/chat/completions", "api",
          functools.partial(Handler.generate, dialect="chat")),
    Route("POST", r"(/v1)?(/v1)?/completions", "api",
          functools.partial(Handler.generate, dialect="completions")),
    Route("POST", r"(/v1)?(/v1|/backend-api/codex)?/responses", "api",
          functools.partial(Handler.generate, dialect="responses")),
    Route("POST", r"(/v1)?(/v1)?/responses/input_tokens", "api",
          functools.partial(answer_count_tokens, dialect="responses")),
    Route("GET", r"(/v1)?(/v1|/backend-api/codex)?/responses", "api", answer_no_socket),
    Route("GET DELETE POST", r"(/v1)?(/v1)?/responses/(?P<id>[^/]+)(/.*)?", "api",
          answer_response),
    Route("POST", GEMINI_PATH + r":(?:generateContent|streamGenerateContent)", "api",
          functools.partial(Handler.generate, dialect="gemini")),
    Route("POST", GEMINI_PATH + r":countTokens", "api",
          functools.partial(answer_count_tokens, dialect="gemini")),
    Route("POST", GEMINI_PATH + r":\w+", "api", answer_not_offered),
    Route("GET HEAD", r"/v1beta\w*(/openai)?/models(?:/(?P<id>[^:]+))?", "api", answer_models),
    Route("GET HEAD", r"(?:/v1)?(?:/v1)?/models(?:/(?P<id>.+))?", "api", answer_models),
    Route("GET HEAD", r"/", "public", answer_root),
    Route("GET HEAD", r"/api/hello", "public", answer_root),
    Route("GET HEAD", r"/health", "public", answer_health),
    Route("GET HEAD", r"/account-limits", "api", answer_account_limits),
    Route("POST", r"/refresh-token", "api", answer_refresh_token),
    Route("GET POST", r"/api/(?:event_logging|claude_code|claude_cli|oauth)/.*", "public",
          answer_discard),
    Route("GET POST DELETE", r"/v1/(?:messages/batches|files|complete|skills)(?:/.*)?", "api",
          answer_not_offered),
    Route("OPTIONS", r"/.*", "public", answer_preflight),
))


def tls_context(config: Config) -> ssl.SSLContext | None:
    """How clients are served by TLS, None where they are not; raises ConfigError."""
    if not (config.tls_cert or config.tls_key):
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:        # a password would be asked for on the terminal
        context.load_cert_chain(os.path.expanduser(config.tls_cert),
                                os.path.expanduser(config.tls_key) or None, password="")
    except (OSError, ValueError) as err:
        raise ConfigError(f"tls_cert and tls_key cannot be used: {err}") from err
    return context


def bind_alone(sock: socket.socket, address: tuple) -> None:
    """Binds without http.server's reverse look-up of the host name, which may take seconds."""
    # on Windows SO_REUSEADDR would let two programs share the port
    name = socket.SO_EXCLUSIVEADDRUSE if os.name == "nt" else socket.SO_REUSEADDR
    sock.setsockopt(socket.SOL_SOCKET, name, 1)
    sock.bind(address)


class ProxyServer(http.server.ThreadingHTTPServer):
    """The listener: accepted connections wait in the relay for their first byte, then get a thread.
    The lock guards `connections` and `active`."""
    request_queue_size = 256
    daemon_threads = True

    def __init__(self, services: Services, host: str, port: int,
                 listener: socket.socket | None = None):
        self.listener = listener        # one that is bound already
        self.services, self.routes = services, ROUTES
        self.guard = KeyGuard(services)
        self.tls = tls_context(services.config)
        self.connections: set[Downstream] = set()
        self._lock = threading.Lock()
        self.active = 0         # requests in threads
        # select() on Windows takes 512 sockets, and a stream has two
        self.max_connections = min(services.config.max_connections,
                                   240 if os.name == "nt" else 1 << 30)
        self.is_stopping, self.started_at = False, time.monotonic()
        if ":" in host:
            self.address_family = socket.AF_INET6
        super().__init__((host, port), Handler)
        self.workers = Workers(services.config.max_threads, self._work)
        self.relay = Relay(services, self.workers.submit, self.release, self._refuse_overdue)

    def server_bind(self) -> None:
        if self.listener is None:
            bind_alone(self.socket, self.server_address)
        else:
            self.socket.close()
            self.socket = self.listener
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = self.server_address[:2]
        scheme = "https" if self.tls else "http"
        self.own_origins = {f"{scheme}://{name}:{self.server_port}" for name in LOOPBACK_NAMES}

    def process_request(self, request: Any, client_address: Any) -> None:
        downstream = Downstream(request)
        with self._lock:
            is_full = len(self.connections) >= self.max_connections
            if not is_full:
                self.connections.add(downstream)
        if is_full:
            self._refuse(downstream)
            return
        with contextlib.suppress(OSError):      # it was reset already: the relay will notice
            request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.relay.park(downstream, self.services.config.client_head_timeout_s)

    def _refuse(self, downstream: Downstream) -> None:
        """503 without a thread and without reading: best effort, at once."""
        error = ProxyError("busy", "the proxy is at its limit of connections or threads")
        body = json_encode(anthropic_render_error(error, new_id("req_"))).encode("ascii")
        with contextlib.suppress(OSError):
            downstream.sock.settimeout(0.1)
            downstream.sock.sendall(
                b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\n"
                b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        self.release(downstream)

    def _refuse_overdue(self, now: float) -> None:
        for downstream in self.workers.overdue(now):
            self._refuse(downstream)

    def release(self, downstream: Downstream, linger: bool = False) -> None:
        """Closes a connection; it counts until it is closed."""
        downstream.close(linger)
        with self._lock:
            self.connections.discard(downstream)

    def _work(self, downstream: Downstream) -> None:
        try:
            if self.tls is None or downstream.shakes_hands(
                    self.tls, time.monotonic() + self.services.config.client_head_timeout_s):
                Handler(self, downstream).run()
            else:
                self.release(downstream)
        except Exception as err:        # a thread's top: log, close this connection, go on
            self.services.log.line("worker: %s", short_trace(err))
            self.release(downstream)

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Counts a request as active, so that a drain waits for it."""
        with self._lock:
            self.active += 1
        try:
            yield
        finally:
            with self._lock:
                self.active -= 1

    def handle_error(self, request: Any, client_address: Any) -> None:
        self.services.log.line("accept: %s", short_trace(sys.exc_info()[1]))

    def listed(self) -> list[tuple[Model, list[Candidate]]]:
        """What is served by name; groups and plain aliases first."""
        rows, services = [], self.services
        for name in (*services.config.groups, *services.config.aliases):
            with contextlib.suppress(ProxyError):       # nobody serves it now
                plan = services.pool.plan(name, name, services.config)
                if plan.candidates and not set("*?[") & set(name):
                    rows.append((plan.models[0]._replace(id=name, label=name), plan.candidates))
        known = {model.id for model, _ in rows}
        return rows + [row for row in services.pool.offers() if row[0].id not in known]

    def model_rows(self) -> list[dict]:
        """What /v1/models lists: each served model, under a claude- name too where it has none."""
        rows = []
        for model, _ in self.listed():
            row = anthropic_render_model(model)
            rows.append(row)
            if not model.id.startswith("claude"):
                rows.append({**row, "id": "claude-" + model.id})
        return rows

    def drain(self, grace_s: float) -> None:
        """Stops accepting, lets running answers finish for `grace_s`, ends the rest with an error
        event.  Idle connections are closed at once."""
        self.is_stopping = True
        self.shutdown()
        self.server_close()
        deadline = time.monotonic() + grace_s
        # active first: a request hands its stream over before it ends
        while time.monotonic() < deadline and (self.active or self.relay.is_busy()):
            time.sleep(0.05)
        self.services.stopping.set()        # who still waits for content hears it within a second
        self.relay.end_all(ProxyError("stopping", "the proxy is stopping"))
        ended = time.monotonic() + 2
        while time.monotonic() < ended and (self.active or self.relay.is_busy()):
            time.sleep(0.02)
        self.relay.stop()
        with self._lock:
            left = list(self.connections)
        for downstream in left:
            self.release(downstream)
        self.services.connections.close()


def shared_listener(host: str, port: int, number: int | None = None) -> socket.socket:
    """A listening socket for several processes, or the inherited one with a `number`.  It does not
    block: of all whom a connection wakes only one gets it."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, fileno=number)
    try:
        if number is None:
            bind_alone(sock, (host, port))
            sock.listen(ProxyServer.request_queue_size)
        sock.set_inheritable(False)     # of a worker's own children
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


# ── 18. Simulated upstream ────────────────────────────────────────────────
# A real HTTP server that plays Google (token endpoint, project discovery,
# Cloud Code, the Gemini API) and, thinly, Anthropic and OpenAI.  It refuses
# what the real ones refuse, drains quota, misbehaves when told, and given
# tools works as a small scripted agent.  Demo and tests share it: it is the
# executable specification.  It knows nothing of the proxy.  `bench` has an
# upstream and a load of its own here, which understand nothing and cost little.

_SIM_WORDS = {400: "INVALID_ARGUMENT", 401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED",
              404: "NOT_FOUND", 429: "RESOURCE_EXHAUSTED", 500: "INTERNAL", 503: "UNAVAILABLE"}


def sim_error(status: int, message: str, reason: str = "", retry: str = "", word: str = "",
              **metadata: str) -> tuple:
    """(status, body) as Google writes errors."""
    error = {"code": status, "message": message, "status": word or _SIM_WORDS[status]}
    details: list[dict] = []
    if reason:
        details.append({"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": reason,
                        "domain": "cloudcode-pa.googleapis.com", "metadata": metadata})
    if retry:
        details.append({"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": retry})
    return status, {"error": {**error, "details": details} if details else error}


SIM_FAULTS = {          # name -> (status, body) of a refusal; other names misbehave in the stream
    "quota": sim_error(429, "You have exhausted your capacity on this model. Your quota will reset "
                       "after 2h21m25s.", "QUOTA_EXHAUSTED", "8485.8s",
                       quotaResetDelay="2h21m25.831582438s"),
    "quota_unknown": sim_error(429, "Individual quota reached.", "QUOTA_EXHAUSTED"),
    "rate": sim_error(429, "Rate limited.", "RATE_LIMIT_EXCEEDED", "40s"),
    "rate_short": sim_error(429, "Rate limited.", "RATE_LIMIT_EXCEEDED", "0.4s"),
    "soft": sim_error(429, "Resource has been exhausted (e.g. check quota)."),
    "capacity": sim_error(503, "No capacity available for model on the server",
                          "MODEL_CAPACITY_EXHAUSTED", "40s"),
    "server": sim_error(500, "Internal error encountered."),
    "503": sim_error(503, "The service is currently unavailable."),
    "auth": sim_error(401, "Request had invalid authentication credentials."),
    "validation": sim_error(403, "Verify your account to continue.", "VALIDATION_REQUIRED",
                            validation_url="https://accounts.google.com/verify"),
    "disabled": sim_error(403, "Gemini has been disabled in this account for violation of Terms of "
                          "Service. You may submit an appeal."),
    "project": sim_error(403, "Cloud Code Private API has not been used in project P before or it "
                         "is disabled.", "SERVICE_DISABLED"),
    "unsupported_client": sim_error(403, "This client is no longer supported for Gemini Code "
                                    "Assist for individuals."),
    "region": sim_error(400, "User location is not supported for the API use.",
                        word="FAILED_PRECONDITION"),
    "missing": sim_error(404, "Requested entity was not found."),
    "version": sim_error(503, "This version of Antigravity is no longer supported."),
    "too_long": sim_error(400, "The input token count (1250000) exceeds the maximum number of "
                          "tokens allowed (1048576)."),
    "signature": sim_error(400, "Corrupted thought signature."),
    "bad": sim_error(400, "Request contains an invalid argument."),
}
SIM_STREAM_FAULTS = ("stall", "cut", "empty", "malformed", "error_event", "html", "reset",
                     "garbage", "thoughts_only", "mid_error", "mid_cut", "blocked", "safety")
SIM_BODIES = {"html": (502, "text/html", b"<html>502 Bad Gateway</html>"),
              "garbage": (200, "text/event-stream", b"\xff\xfe{][")}
_INNER_KEYS = {"contents", "systemInstruction", "tools", "toolConfig", "generationConfig",
               "safetySettings", "cachedContent", "labels", "sessionId", "session_id"}
_SCHEMA_KEYS = {"type", "description", "nullable", "enum", "items", "properties", "required"}
_SIM_UNKNOWN = "Invalid JSON payload received. Unknown name \"%s\" at '%s': Cannot find field."
_PART_KINDS = ("text", "inlineData", "functionCall", "functionResponse", "fileData")


# What the real service refuses: each check gives the refusal's text, or None

def sim_check_schema(schema: Any, where: str, depth: int = 0) -> str | None:
    """The first thing the service would not take in a tool's parameters."""
    if not isinstance(schema, dict):
        return f"Invalid value at '{where}'"
    unknown = schema.keys() - _SCHEMA_KEYS
    if unknown:
        return _SIM_UNKNOWN % (min(unknown), where)
    if depth > 16:
        return f"{where}: maximum schema depth exceeded"
    kind = str(schema.get("type")).lower()
    if kind not in ("object", "array", "string", "number", "integer", "boolean"):
        return f"Proto field is not repeating, cannot start list. ({where}.type)"
    if "enum" in schema and (kind != "string" or not schema["enum"]
                             or not all(isinstance(v, str) and v for v in schema["enum"])):
        return f"{where}.enum: only allowed for STRING type"
    if kind == "array":
        return (sim_check_schema(schema["items"], where + ".items", depth + 1) if "items" in schema
                else f"{where}.items: missing field")
    properties = schema.get("properties", {})
    if any(name not in properties for name in schema.get("required", ())):
        return f"{where}.required[0]: property is not defined"
    return next((text for name, child in properties.items()
                 for text in (sim_check_schema(child, f"{where}.properties[{name}]", depth + 1),)
                 if text), None)


def _sim_check_contents(contents: Any, is_enveloped: bool) -> str | None:
    if not isinstance(contents, list) or not contents:
        return "contents is not specified"
    calls = 0
    for position, content in enumerate(contents):
        if content.get("role") not in ("user", "model"):
            return "Please use a valid role: user, model."
        parts = content.get("parts") or []
        for part in parts:
            if sum(kind in part for kind in _PART_KINDS) != 1:
                return "required oneof field 'data' must have one initialized field"
            if part.get("text") == "" and is_enveloped and not part.get("thought"):
                return "text content blocks must be non-empty"
        answers = sum("functionResponse" in p for p in parts)
        if answers != calls:
            return ("Please ensure that the number of function response parts is equal to the "
                    "number of function call parts of the function call turn.")
        calls = sum("functionCall" in p for p in parts)
        if calls and (not position or contents[position - 1]["role"] != "user"):
            return ("Please ensure that function call turn comes immediately after a user turn or "
                    "after a function response turn.")
    return None


def _sim_open_steps(contents: list) -> list[dict]:
    """Model turns with calls after the last user turn that holds text."""
    steps: list[dict] = []
    for content in reversed(contents):
        answers = any("functionResponse" in p for p in content["parts"])
        if content["role"] == "user" and not answers:
            break
        if content["role"] == "model" and any("functionCall" in p for p in content["parts"]):
            steps.insert(0, content)
    return steps


def _sim_check_signatures(contents: list, family: str, is_thinking: bool) -> str | None:
    for step in _sim_open_steps(contents):
        if family == "gemini3":
            call = next(p for p in step["parts"] if "functionCall" in p)
            signature = call.get("thoughtSignature")
            if not signature:
                return ("Function call is missing a thought_signature in functionCall parts. This "
                        "is required for tools to work correctly. function call "
                        f"`default_api:{call['functionCall'].get('name')}`, position 1.")
            if signature != "skip_thought_signature_validator" and not signature.startswith("simg"):
                return "Corrupted thought signature."
        elif family == "claude" and is_thinking:
            first = step["parts"][0]
            if not first.get("thought"):
                return ("messages.1.content.0.type: Expected `thinking` or "
                        "`redacted_thinking`, but found `text`.")
            if not str(first.get("thoughtSignature", "")).startswith("Rsim"):
                return "messages.1.content.0: Invalid `signature` in `thinking` block"
    return None


_SIM_SNAKE = {n: re.sub("_(.)", lambda m: m[1].upper(), n) for n in (
    "include_thoughts", "thinking_budget", "thinking_level", "thinking_config", "stop_sequences",
    "generation_config", "system_instruction", "tool_config", "function_declarations",
    "parameters_json_schema", "function_calling_config", "allowed_function_names", "google_search",
    "response_schema", "response_json_schema", "response_mime_type", "max_output_tokens")}


def sim_camel(value: Any) -> Any:
    """The body with names in camel case: the Gemini API takes both kinds."""
    if isinstance(value, dict):
        return {_SIM_SNAKE.get(k, k): sim_camel(v) for k, v in value.items()}
    return [sim_camel(v) for v in value] if isinstance(value, list) else value


def sim_from_key(body: Mapping) -> dict:
    """The body of the Gemini API as Cloud Code would have it: its SDKs tell a streamed answer in as
    many contents as it had chunks."""
    inner, contents = sim_camel(body), []
    for content in inner.get("contents") or ():
        if contents and contents[-1]["role"] == content.get("role"):
            contents[-1]["parts"] += content["parts"]
        else:
            contents.append({**content, "parts": list(content.get("parts") or ())})
    return {**inner, "contents": contents}


def sim_refuses(inner: Mapping, model: Model | None, is_enveloped: bool) -> str | None:
    """Why the service would answer 400 to this request, None when it would not."""
    unknown = inner.keys() - _INNER_KEYS
    if unknown or (not is_enveloped and ("sessionId" in inner or "session_id" in inner)):
        return _SIM_UNKNOWN % (min(unknown, default="sessionId"), "request")
    family = model.family if model else "gemini3"
    kinds = [kind for tool in inner.get("tools", ()) for kind in tool]
    if "googleSearch" in kinds and (len(kinds) > 1 or not family.startswith("gemini")):
        return "Google Search is not supported together with other tools, or by this model."
    config = inner.get("generationConfig", {})
    thinking = config.get("thinkingConfig", {})
    budget, most = thinking.get("thinkingBudget", 0), config.get("maxOutputTokens", 1)
    if "thinkingBudget" in thinking and "thinkingLevel" in thinking:
        return "thinking_budget and thinking_level cannot both be set"
    if model and not 0 < most <= model.output_tokens:
        return f"maxOutputTokens must be from 1 to {model.output_tokens}"
    if family == "claude":
        if budget and most <= budget:
            return "`max_tokens` must be greater than `thinking.budget_tokens`"
        if inner["contents"] and inner["contents"][-1].get("role") != "user":
            return ("This model does not support assistant message prefill. The conversation must "
                    "end with a user message.")
    text = _sim_check_contents(inner.get("contents"), is_enveloped)
    if text:
        return text
    for tool in inner.get("tools", ()):
        for position, row in enumerate(tool.get("functionDeclarations", ())):
            where = f"request.tools[0].function_declarations[{position}]"
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.:-]{0,63}", row.get("name", "")):
                return f"Invalid function name at '{where}'"
            text = sim_check_schema(row["parameters"], where + ".parameters") if (
                is_enveloped or "parameters" in row) else None      # the Gemini API has two forms
            if text:
                return text
    return _sim_check_signatures(inner["contents"], family, bool(budget))


# The Anthropic upstream, thinly: the same agent behind Anthropic's rules and words

_NATIVE_KEYS = {"model", "messages", "max_tokens", "system", "stream", "stop_sequences", "tools",
                "temperature", "top_p", "top_k", "thinking", "output_config", "output_format",
                "tool_choice", "metadata", "cache_control", "context_management", "safeguards",
                "service_tier", "container"}


def sim_native_signature(thought: str) -> str:
    return "Esim" + hashlib.sha256(thought.encode()).hexdigest()


def _native_blocks(message: Mapping) -> list[dict]:
    content = message["content"]
    return content if isinstance(content, list) else [{"type": "text", "text": content}]


def sim_native_refuses(body: Mapping) -> str | None:
    """Why Anthropic would answer 400 to this request, None when it would not."""
    unknown = body.keys() - _NATIVE_KEYS
    if unknown:
        return f"{min(unknown)}: Extra inputs are not permitted"
    if not isinstance(body.get("max_tokens"), int):
        return "max_tokens: Field required"
    waiting: set = set()
    for at, message in enumerate(body["messages"]):
        blocks = _native_blocks(message)
        if not blocks:
            return f"messages.{at}: content must be non-empty"
        for position, block in enumerate(blocks):
            where = f"messages.{at}.content.{position}"
            if block["type"] == "text" and not block["text"].strip():
                return f"{where}: text content blocks must contain non-whitespace text"
            if block["type"] == "thinking" and block["signature"] != sim_native_signature(
                    block["thinking"]):
                return f"{where}: Invalid `signature` in `thinking` block"
        if message["role"] == "system":
            continue
        answered = {b["tool_use_id"] for b in blocks if b["type"] == "tool_result"}
        if waiting - answered:
            return (f"messages.{at}: `tool_use` ids were found without `tool_result` blocks "
                    f"immediately after: {', '.join(sorted(waiting - answered))}")
        if answered - waiting:
            return (f"messages.{at}: unexpected `tool_use_id` found in `tool_result` blocks: "
                    f"{', '.join(sorted(answered - waiting))}")
        waiting = {b["id"] for b in blocks if b["type"] == "tool_use"}
    return None


def _sim_inner(contents: list, tools: list, forced: list | None, answer: tuple,
               system: str) -> dict:
    """A body as the scripted agent reads it.  Of the tools `forced` names one must be called, of an
    empty list any, of None none; `answer` is its schema and the texts that stop it."""
    calling = {} if forced is None else {"mode": "ANY", "allowedFunctionNames": forced}
    return {"contents": contents, "tools": [{"functionDeclarations": tools}],
            "generationConfig": {"responseSchema": answer[0], "stopSequences": answer[1]},
            "toolConfig": {"functionCallingConfig": calling},
            "systemInstruction": {"parts": [{"text": system}]}}


def sim_from_native(body: Mapping) -> dict:
    """The body as the scripted agent reads it."""
    names: dict[str, str] = {}
    contents = []
    for message in body["messages"]:
        if message["role"] == "system":
            continue
        parts: list[dict] = []
        for block in _native_blocks(message):
            if block["type"] == "text":
                parts.append({"text": block["text"]})
            elif block["type"] in ("image", "document"):
                parts.append({"inlineData": {}})
            elif block["type"] == "tool_use":
                names[block["id"]] = block["name"]
                parts.append({"functionCall": {"name": block["name"], "args": block["input"]}})
            elif block["type"] == "tool_result":
                told = block.get("content") or ""
                told = told if isinstance(told, str) else "".join(b.get("text", "") for b in told)
                parts.append({"functionResponse": {"name": names.get(block["tool_use_id"], ""),
                                                   "response": {"result": told}}})
        role = "model" if message["role"] == "assistant" else "user"
        contents.append({"role": role, "parts": parts})
    tools = [{"name": t["name"], "parameters": t.get("input_schema") or {}}
             for t in body.get("tools", ()) if "name" in t]
    choice = object_of(body.get("tool_choice"))
    named = [choice["name"]] if "name" in choice else []
    form = object_of(body.get("output_format")
                     or object_of(body.get("output_config")).get("format"))
    return _sim_inner(contents, tools, named if choice.get("type") in ("any", "tool") else None,
                      (form.get("schema"), body.get("stop_sequences", ())),
                      json_encode(body.get("system") or ""))


# The scripted agent: what a prompt's verbs and names ask for, of the tools its client offers

_FILE_NAME = re.compile(r"(?<![\w/])[\w./-]*\w\.\w{1,5}\b")
_FOLDER = re.compile(r"working directory:\s*(\S+)", re.I)
_CONTEXTS = re.compile(r"\A(?:\s*<(\w+)>.*?</\1>\s*)+(?=\S)", re.S)    # told before a text
_VERBS = re.compile(r"\b(?:(?P<write>create|write|make)|(?P<run>run|execute)"
                    r"|(?P<edit>edit|change|modify|replace)|(?P<read>read|show))\b", re.I)
_SHELLS = ("bash", "shell", "exec", "run")
_VERB_TOOLS = {"write": ("write", "create_file", "apply_patch", *_SHELLS), "run": _SHELLS,
               "edit": ("edit", "replace", "apply_patch", *_SHELLS),
               "read": ("read", "view", *_SHELLS)}
_SIM_PROGRAM = 'print("hello from the agproxy demo")\n'
_SIM_SHELL = {"write": f"printf '%s' '{_SIM_PROGRAM}' > ", "run": "python3 ", "": "python3 ",
              "edit": "sed -i s/hello/goodbye/ ", "read": "cat "}
_SIM_VALUES = {"string": "demo", "integer": 1, "number": 1, "boolean": True, "array": [],
               "object": {}}


def _sim_find_tool(kind: str, tools: list[dict]) -> dict | None:
    tools = [t for t in tools if not {"stdin", "image"} & set(t["name"].lower().split("_"))]
    for word in _VERB_TOOLS[kind]:
        named = [t for t in tools if t["name"].lower() == word] or [
            t for t in tools if word in t["name"].lower().split("_")]
        if named:
            return named[0]
    return None


def _sim_input(tool: Mapping, kind: str, path: str) -> str:
    """What a tool of raw text gets: a patch, or JavaScript around the client's own shell tool."""
    command = json_encode(_SIM_SHELL[kind] + path)
    if "patch" not in tool["name"]:
        return f"const r = await tools.exec_command({{cmd: {command}}}); text(r.output);"
    lines = "+" + _SIM_PROGRAM.rstrip()
    if kind == "edit":
        lines = f"@@\n-{lines[1:]}\n{lines.replace('hello', 'goodbye')}"
    return (f"*** Begin Patch\n*** {'Update' if kind == 'edit' else 'Add'} File: {path}\n{lines}"
            "\n*** End Patch")


def _sim_arguments(tool: Mapping, kind: str, path: str) -> dict:
    """Arguments for a tool whose schema only its client knows: by the names of its properties."""
    schema = tool.get("parameters", {})
    if [*schema.get("properties", {})] == ["input"]:
        return {"input": _sim_input(tool, kind, path)}
    command = _SIM_SHELL[kind] + path
    meant = {name: value for names, value in (
        ("path file_path filepath file filename absolute_path filePath", path),
        ("content contents file_text text", _SIM_PROGRAM), ("command cmd", command),
        ("old_string old_str oldString", "hello"), ("new_string new_str newString", "goodbye"),
    ) for name in names.split()}
    required = schema.get("required", ())
    arguments = {}
    for name, child in schema.get("properties", {}).items():
        if name in meant and (name in required or kind):
            arguments[name] = meant[name]
        elif name in required:
            values = child.get("enum") or [_SIM_VALUES[child.get("type", "string").lower()]]
            arguments[name] = values[0]
    if kind == "read":
        arguments = {n: v for n, v in arguments.items() if v == path or n in required}
    if object_of(schema.get("properties", {}).get("command")).get("type") == "array":
        arguments["command"] = ["bash", "-lc", command]
    return arguments


def _sim_steps(prompt: str, inner: Mapping) -> list[tuple[str, dict]]:
    """(tool name, arguments) of every call the prompt asks for, in its order."""
    tools = [row for tool in inner.get("tools", ())
             for row in tool.get("functionDeclarations", ())]
    tools = [{**t, "parameters": t.get("parameters") or t.get("parametersJsonSchema") or {}}
             for t in tools]
    calling = inner.get("toolConfig", {}).get("functionCallingConfig", {})
    if calling.get("mode") == "ANY":
        allowed = calling.get("allowedFunctionNames")
        tool = next((t for t in tools if not allowed or t["name"] in allowed), None)
        return [(tool["name"], _sim_arguments(tool, "", "demo.py"))] if tool else []
    named = _FILE_NAME.search(prompt)
    path = named[0] if named else "demo.py"
    folder = _FOLDER.search(json_encode(inner).replace("\\n", "\n"))
    if folder and not path.startswith("/"):
        path = folder[1].rstrip("/\\\"") + "/" + path
    steps = []
    for verb in _VERBS.finditer(prompt):
        tool = _sim_find_tool(verb.lastgroup, tools)
        if tool:
            steps.append((verb.start(), tool["name"], _sim_arguments(tool, verb.lastgroup, path)))
    used = {name for _, name, _ in steps}
    for tool in tools:
        mention = re.search(rf"\b{re.escape(tool['name'])}\b", prompt)
        if mention and tool["name"] not in used:
            steps.append((mention.start(), tool["name"], _sim_arguments(tool, "", path)))
    return [(name, arguments) for _, name, arguments in sorted(steps, key=lambda s: s[0])]


def _sim_texts(content: Mapping) -> list[str]:
    """What a person wrote in a user turn: its texts without the client's reminders."""
    return [p["text"] for p in content["parts"]
            if p.get("text", "").strip() not in ("", ".")
            and not p["text"].lstrip().startswith("<system-reminder>")]


def _sim_value(schema: Mapping, prompt: str, defs: Mapping = {}) -> Any:
    """A JSON value of a schema, for requests that want structured output."""
    defs = schema.get("$defs", defs)
    if "$ref" in schema:
        return _sim_value(defs[schema["$ref"].rpartition("/")[2]], prompt, defs)
    if schema.get("anyOf"):
        return _sim_value(schema["anyOf"][0], prompt, defs)
    kind = str(schema.get("type", "string")).lower()
    if schema.get("enum"):
        return schema["enum"][0]
    if kind == "object":
        return {name: _sim_value(child, prompt, defs)
                for name, child in schema.get("properties", {}).items()}
    if kind == "array":
        return [_sim_value(schema["items"], prompt, defs)] if "items" in schema else []
    return prompt[:40] or "demo" if kind == "string" else _SIM_VALUES[kind]


def sim_agent(inner: Mapping) -> list[list[dict]]:
    """The answer's chunks of parts: the next calls, or a text.  Deterministic."""
    contents = inner["contents"]
    last = max((i for i, c in enumerate(contents) if c["role"] == "user" and _sim_texts(c)),
               default=0)
    prompt = _CONTEXTS.sub("", (_sim_texts(contents[last]) or [""])[-1])
    results = [p["functionResponse"] for c in contents[last:] for p in c["parts"]
               if "functionResponse" in p]
    config = inner.get("generationConfig", {})
    schema = config.get("responseSchema") or config.get("responseJsonSchema")
    system = inner.get("systemInstruction", {}).get("parts", ())
    wanted = next(filter(None, (str(text).partition(
        "JSON value of this schema and nothing else: ")[2]
        for text in (*_sim_texts(contents[last]), *(p.get("text") for p in system)))), "")
    if schema or wanted:
        with contextlib.suppress(ValueError):       # the prompt only spoke of a schema
            return [[{"text": json_encode(_sim_value(schema or json.loads(wanted), prompt))}]]
    if "Do NOT call any tools" in prompt:       # a client compacts its conversation
        return [[{"text": "<analysis>It was short.</analysis>\n<summary>"}], [{"text": (
            f"{len(contents)} turns with the simulated upstream.</summary>")}]]
    steps = _sim_steps(prompt, inner)
    if len(results) < len(steps):
        batch = steps if "parallel" in prompt.lower() and not results else [steps[len(results)]]
        return [[{"functionCall": {"name": name, "args": arguments}} for name, arguments in batch]]
    if results:
        told = [str(next(iter(r["response"].values()), ""))[:400] for r in results]
        text = "Done. The tools answered:\n" + "\n".join(f"- {t}" for t in told)
    else:
        count = re.search(r"\bcount to (\d+)", prompt)
        images = sum("inlineData" in p for c in contents[last:] for p in c["parts"])
        text = ("".join(f"{n} " for n in range(1, int(count[1]) + 1)) if count else
                f"This is the simulated upstream. {f'I see {images} image(s). ' if images else ''}"
                f"You said: {prompt[:200]}")
    for stop in config.get("stopSequences", ()):
        text = text.partition(stop)[0]
    words = re.findall(r"\S+\s*|\s+", text)
    return [[{"text": "".join(words[i:i + 3])}]
            for i in range(0, len(words), 3)] or [[{"text": "."}]]


def sim_native_answer(body: Mapping) -> dict:
    """The whole Message: a signed thought where thinking is on, then what the agent says."""
    content: list[dict] = []
    if object_of(body.get("thinking")).get("type") in ("enabled", "adaptive"):
        thought = "" if body["thinking"].get("display") == "omitted" else (
            "Thinking about the request.")
        content.append({"type": "thinking", "thinking": thought,
                        "signature": sim_native_signature(thought)})
    parts = [part for batch in sim_agent(sim_from_native(body)) for part in batch]
    calls = [part["functionCall"] for part in parts if "functionCall" in part]
    content += [{"type": "tool_use", "id": "toolu_sim" + os.urandom(8).hex(),
                 "name": call["name"], "input": call["args"]} for call in calls]
    text = "".join(part.get("text", "") for part in parts)
    if text:
        content.append({"type": "text", "text": text})
    usage = {"input_tokens": len(json_encode(body)) // 4, "cache_creation_input_tokens": 7,
             "cache_read_input_tokens": 0, "output_tokens": len(json_encode(content)) // 4}
    return {"id": "msg_sim" + os.urandom(8).hex(), "type": "message", "role": "assistant",
            "model": body["model"], "content": content, "usage": usage, "stop_sequence": None,
            "stop_reason": "tool_use" if calls else "end_turn", "container": None}


_NATIVE_STREAMED = {        # block -> (field that is streamed, delta, its field, what a start has)
    "text": ("text", "text_delta", "text", {"text": ""}),
    "thinking": ("thinking", "thinking_delta", "thinking", {"thinking": "", "signature": ""}),
    "tool_use": ("input", "input_json_delta", "partial_json", {"input": {}}),
    "server_tool_use": ("input", "input_json_delta", "partial_json", {"input": {}}),
}


def sim_native_events(message: Mapping) -> Iterator[dict]:
    """The Message as the events of its stream."""
    usage = message["usage"]
    yield {"type": "message_start", "message": {**message, "content": [], "stop_reason": None,
                                                "usage": {**usage, "output_tokens": 1}}}
    yield {"type": "ping"}
    for index, block in enumerate(message["content"]):
        name, kind, key, empty = _NATIVE_STREAMED.get(block["type"], ("", "", "", {}))
        start = {k: v for k, v in block.items() if k != "citations"}
        yield {"type": "content_block_start", "index": index, "content_block": {**start, **empty}}
        text = json_encode(block["input"]) if name == "input" else block.get(name, "")
        deltas = [{"type": kind, key: text[at:at + 12]} for at in range(0, len(text), 12)]
        deltas += [{"type": "citations_delta", "citation": c} for c in block.get("citations", ())]
        if "signature" in block:
            deltas.append({"type": "signature_delta", "signature": block["signature"]})
        for delta in deltas:
            yield {"type": "content_block_delta", "index": index, "delta": delta}
        yield {"type": "content_block_stop", "index": index}
    yield {"type": "message_delta", "usage": {"output_tokens": usage["output_tokens"]},
           "delta": {"stop_reason": message["stop_reason"], "stop_sequence": None}}
    yield {"type": "message_stop"}


SIM_NATIVE_FAULTS = {       # name -> (status, error type, message)
    "quota": (429, "rate_limit_error", "This request would exceed your account's rate limit."),
    "rate": (429, "rate_limit_error", "Number of requests has exceeded your rate limit."),
    "capacity": (529, "overloaded_error", "Overloaded"),
    "server": (500, "api_error", "Internal server error"),
    "auth": (401, "authentication_error", "invalid x-api-key"),
    "disabled": (403, "permission_error", "This organization has been disabled."),
    "missing": (404, "not_found_error", "model: claude-sim"),
    "too_long": (400, "invalid_request_error",
                 "prompt is too long: 210000 tokens > 200000 maximum"),
    "signature": (400, "invalid_request_error",
                  "messages.1.content.0: Invalid `signature` in `thinking` block"),
    "bad": (400, "invalid_request_error", "temperature: range: 0..1"),
}


# The OpenAI upstream, thinly: Chat and Responses before the same agent

_CHAT_KEYS = {"model", "messages", "stream", "stream_options", "max_tokens", "temperature", "top_p",
              "max_completion_tokens", "stop", "tools", "tool_choice", "parallel_tool_calls", "n",
              "response_format", "seed", "presence_penalty", "frequency_penalty", "user",
              "reasoning_effort", "verbosity", "service_tier", "prompt_cache_key", "metadata",
              "store", "logprobs", "logit_bias", "web_search_options"}
_RESPONSES_KEYS = {"model", "input", "instructions", "stream", "store", "include", "tools", "user",
                   "tool_choice", "parallel_tool_calls", "max_output_tokens", "temperature",
                   "top_p", "reasoning", "text", "prompt_cache_key", "client_metadata", "metadata",
                   "previous_response_id", "service_tier", "truncation", "stream_options"}


def _sim_call_rows(body: Mapping) -> list[tuple[str, str]]:
    """(what, call id) of every call, answer and end of a turn, in order."""
    rows: list[tuple[str, str]] = []
    for message in body.get("messages", ()):
        rows += [("call", c["id"]) for c in message.get("tool_calls") or ()]
        if message["role"] == "tool":
            rows.append(("answer", message["tool_call_id"]))
        elif message["role"] == "user":
            rows.append(("turn", ""))
    for item in body["input"] if isinstance(body.get("input"), list) else ():
        kind = item.get("type", "message")
        if kind in ("function_call", "custom_tool_call"):
            rows.append(("call", item["call_id"]))
        elif kind.endswith("_output"):
            rows.append(("answer", item["call_id"]))
    return rows


def sim_openai_refuses(body: Mapping) -> str | None:
    """Why OpenAI would answer 400 to this request, None when it would not."""
    is_chat = "messages" in body
    unknown = body.keys() - (_CHAT_KEYS if is_chat else _RESPONSES_KEYS)
    if unknown:
        return f"Unknown parameter: '{min(unknown)}'."
    waiting: set = set()
    for what, call_id in _sim_call_rows(body):
        if what == "call":
            waiting.add(call_id)
        elif what == "answer" and call_id not in waiting:
            return f"No tool call found for function call output with call_id {call_id}."
        elif what == "turn" and waiting:
            return ("An assistant message with 'tool_calls' must be followed by tool messages "
                    f"responding to each 'tool_call_id': {', '.join(sorted(waiting))}")
        waiting -= {call_id} if what == "answer" else set()
    if waiting:
        return f"No tool output found for function call {min(waiting)}."
    items = body["input"] if isinstance(body.get("input"), list) else []
    for item, after in zip(items, [*items[1:], {}]):
        if item.get("type") == "reasoning":
            if not str(item.get("encrypted_content") or "gAAAsim").startswith("gAAAsim"):
                return "The encrypted content could not be verified."
            if after.get("role") == "user" or not after:
                return "Item of type 'reasoning' was provided without its required following item."
    for tool in body.get("tools") or ():
        row = tool.get("function", tool)
        if tool["type"] == "function" and not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", row["name"]):
            return f"Invalid 'tools[0].name': '{row['name']}'."
    return None


def _sim_parts(content: Any) -> list[dict]:
    """The parts of a content in either dialect, as the agent reads them."""
    if not isinstance(content, list):
        return [{"text": content}] if content else []
    return [{"text": p["text"]} if "text" in p else {"inlineData": {}} for p in content]


def _sim_openai_tools(body: Mapping) -> list[dict]:
    """The tools of a body, those of namespaces and of Codex's additional_tools too."""
    items = body["input"] if isinstance(body.get("input"), list) else ()
    rows = [*(body.get("tools") or ()), *(
        t for i in items if i.get("type") == "additional_tools" for t in i.get("tools") or ())]
    return [{"name": f["name"], "parameters": f.get("parameters") or {
        "properties": {"input": {"type": "string"}}, "required": ["input"]},
        "is_custom": t["type"] == "custom"}
        for row in rows for t in row.get("tools", [row]) for f in [t.get(t["type"], t)]
        if "name" in f]


def sim_from_openai(body: Mapping) -> dict:
    """The body as the scripted agent reads it."""
    names: dict[str, str] = {}
    contents: list[dict] = []

    def add(role: str, parts: list[dict]) -> None:
        if contents and contents[-1]["role"] == role:
            contents[-1]["parts"] += parts
        elif parts:
            contents.append({"role": role, "parts": parts})

    def call(call_id: str, name: str, arguments: Any) -> None:
        names[call_id] = name
        add("model", [{"functionCall": {"name": name, "args": arguments}}])

    def answer(call_id: str, content: Any) -> None:
        told = "".join(p.get("text", "") for p in _sim_parts(content))
        add("user", [{"functionResponse": {"name": names.get(call_id, ""),
                                           "response": {"result": told}}}])
    given = body.get("messages") or body.get("input") or []
    for item in [{"role": "user", "content": given}] if isinstance(given, str) else given:
        kind, role = item.get("type", "message"), item.get("role")
        if kind in ("function_call", "custom_tool_call"):
            call(item["call_id"], item["name"], item.get("arguments") or item.get("input"))
        elif kind.endswith("_output"):
            answer(item["call_id"], item.get("output"))
        elif role == "tool":
            answer(item["tool_call_id"], item.get("content"))
        elif role in ("user", "assistant"):
            add("model" if role == "assistant" else "user", _sim_parts(item.get("content")))
            for row in item.get("tool_calls") or ():
                inner = row[row["type"]]
                call(row["id"], inner["name"], inner.get("arguments") or inner.get("input"))
    choice = body.get("tool_choice")
    named = object_of(object_of(choice).get("function") or choice).get("name")
    form = object_of(body.get("response_format") or object_of(body.get("text")).get("format"))
    schema = object_of(object_of(form.get("json_schema")).get("schema") or form.get("schema"))
    stop = body.get("stop") or []
    return _sim_inner(
        contents or [{"role": "user", "parts": [{"text": "."}]}], _sim_openai_tools(body),
        [named] if named else [] if choice == "required" else None,
        (schema, [stop] if isinstance(stop, str) else stop), json_encode(body)[:20000])


def sim_chat_answer(body: Mapping) -> tuple[dict, list[dict]]:
    """(the message, its deltas) of a Chat answer."""
    inner = sim_from_openai(body)
    custom = {t["name"] for t in inner["tools"][0]["functionDeclarations"] if t["is_custom"]}
    deltas: list[dict] = [{"role": "assistant", "content": ""}]
    message: dict = {"role": "assistant", "content": None}
    if body.get("reasoning_effort") not in (None, "none"):
        deltas += [{"reasoning_content": "Thinking about "}, {"reasoning_content": "the request."}]
        message["reasoning_content"] = "Thinking about the request."
    for parts in sim_agent(inner):
        for part in parts:
            if "text" in part:
                message["content"] = (message["content"] or "") + part["text"]
                deltas.append({"content": part["text"]})
                continue
            calls = message.setdefault("tool_calls", [])
            text = json_encode(part["functionCall"]["args"])
            name, kind, key = part["functionCall"]["name"], "function", "arguments"
            if name in custom:
                kind, key, text = "custom", "input", str(part["functionCall"]["args"]["input"])
            row = {"id": "call_sim" + os.urandom(8).hex(), "type": kind,
                   kind: {"name": name, key: text}}
            deltas.append({"tool_calls": [{"index": len(calls), **row, kind: {
                "name": name, key: ""}}]})
            deltas += [{"tool_calls": [{"index": len(calls), kind: {key: text[at:at + 9]}}]}
                       for at in range(0, len(text), 9)]
            calls.append(row)
    return message, deltas


def sim_chat(body: Mapping) -> tuple[dict, list[dict]]:
    """(the whole completion, the chunks of its stream)."""
    message, deltas = sim_chat_answer(body)
    finish = "tool_calls" if "tool_calls" in message else "stop"
    prompt, spent = len(json_encode(body)) // 4, len(json_encode(message)) // 4
    usage = {"prompt_tokens": prompt, "completion_tokens": spent, "total_tokens": prompt + spent,
             "prompt_tokens_details": {"cached_tokens": 3},
             "completion_tokens_details": {"reasoning_tokens": 2}}
    head = {"id": "chatcmpl-sim" + os.urandom(8).hex(), "created": 1795000000,
            "model": body["model"]}
    chunks = [{**head, "object": "chat.completion.chunk", "choices": [
        {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}]}
        for delta in deltas]
    chunks.append({**chunks[0], "choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
    if object_of(body.get("stream_options")).get("include_usage"):
        chunks.append({**chunks[0], "choices": [], "usage": usage})
    return {**head, "object": "chat.completion", "usage": usage, "system_fingerprint": "fp_sim",
            "choices": [{"index": 0, "message": message, "finish_reason": finish}]}, chunks


def sim_response(body: Mapping) -> dict:
    """The whole response: a reasoning item where that is asked for, then what the agent says."""
    inner = sim_from_openai(body)
    custom = {t["name"] for t in inner["tools"][0]["functionDeclarations"] if t["is_custom"]}
    output: list[dict] = []
    if object_of(body.get("reasoning")).get("effort") not in (None, "none"):
        item = {"id": "rs_sim" + os.urandom(6).hex(), "type": "reasoning",
                "summary": [{"type": "summary_text", "text": "Thinking about the request."}]}
        if "reasoning.encrypted_content" in (body.get("include") or ()):
            item["encrypted_content"] = "gAAAsim" + os.urandom(12).hex()
        output.append(item)
    parts = [part for batch in sim_agent(inner) for part in batch]
    text = "".join(part.get("text", "") for part in parts)
    if text:
        output.append({"id": "msg_sim" + os.urandom(6).hex(), "type": "message",
                       "role": "assistant", "status": "completed", "content": [
                           {"type": "output_text", "text": text, "annotations": [],
                            "logprobs": []}]})
    for call in [part["functionCall"] for part in parts if "functionCall" in part]:
        head = {"id": "fc_sim" + os.urandom(6).hex(), "call_id": "call_sim" + os.urandom(8).hex(),
                "name": call["name"], "status": "completed"}
        output.append({**head, "type": "custom_tool_call",
                       "input": str(call["args"].get("input"))} if call["name"] in custom else
                      {**head, "type": "function_call", "arguments": json_encode(call["args"])})
    prompt, spent = len(json_encode(body)) // 4, len(json_encode(output)) // 4
    return {"id": "resp_sim" + os.urandom(8).hex(), "object": "response", "created_at": 1795000000,
            "status": "completed", "error": None, "incomplete_details": None,
            "model": body["model"], "output": output, "metadata": {},
            "parallel_tool_calls": True, "tool_choice": body.get("tool_choice", "auto"),
            "tools": body.get("tools", []), "usage": {
                "input_tokens": prompt,
                "input_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 0},
                "output_tokens": spent, "output_tokens_details": {"reasoning_tokens": 2},
                "total_tokens": prompt + spent}}


_SIM_STREAMED = {       # item -> its event, the place of its pieces, the empty fields of its start
    "message": ("response.output_text", {"content_index": 0}, {"content": []}),
    "reasoning": ("response.reasoning_summary_text", {"summary_index": 0}, {"summary": []}),
    "function_call": ("response.function_call_arguments", {}, {"arguments": ""}),
    "custom_tool_call": ("response.custom_tool_call_input", {}, {"input": ""}),
}


def sim_response_events(response: Mapping) -> Iterator[dict]:
    """The response as the events of its stream, without their numbers."""
    begun = {**response, "status": "in_progress", "output": [], "usage": None}
    yield {"type": "response.created", "response": begun}
    yield {"type": "response.in_progress", "response": begun}
    for index, item in enumerate(response["output"]):
        name, place, empty = _SIM_STREAMED[item["type"]]
        place = {"item_id": item["id"], "output_index": index, **place}
        start = {k: v for k, v in item.items() if k != "encrypted_content"}
        yield {"type": "response.output_item.added", "output_index": index,
               "item": {**start, **empty, "status": "in_progress"}}
        part = next(iter(item.get("content") or item.get("summary") or ()), None)
        text = part["text"] if part else item.get("arguments", item.get("input"))
        if part:
            kind = "content_part" if item["type"] == "message" else "reasoning_summary_part"
            yield {"type": f"response.{kind}.added", **place, "part": {**part, "text": ""}}
        more = {"logprobs": []} if item["type"] == "message" else {}
        for at in range(0, len(text), 12):
            yield {"type": name + ".delta", **place, "delta": text[at:at + 12], **more}
        done = "text" if part else "arguments" if "arguments" in item else "input"
        yield {"type": name + ".done", **place, done: text, **more}
        if part:
            yield {"type": f"response.{kind}.done", **place, "part": part}
        yield {"type": "response.output_item.done", "output_index": index, "item": item}
    yield {"type": "response.completed", "response": response}


SIM_OPENAI_FAULTS = {       # name -> (status, type, code, message)
    "quota": (429, "insufficient_quota", "insufficient_quota", "You exceeded your current quota."),
    "rate": (429, "requests", "rate_limit_exceeded",
             "Rate limit reached for gpt-sim. Please try again in 40s."),
    "capacity": (503, "service_unavailable_error", "server_is_overloaded",
                 "The server is overloaded."),
    "server": (500, "server_error", None, "The server had an error."),
    "auth": (401, "invalid_request_error", "invalid_api_key", "Incorrect API key provided."),
    "missing": (404, "invalid_request_error", "model_not_found", "The model does not exist."),
    "too_long": (400, "invalid_request_error", "context_length_exceeded",
                 "This model's maximum context length is 128000 tokens."),
    "bad": (400, "invalid_request_error", "invalid_value", "Invalid value."),
}


# The server

class SimAccount:
    """Somebody with a Google account; `calls_left` until a quota refusal, None is no end."""

    def __init__(self, name: str, calls_left: int | None = None):
        self.name, self.calls_left, self.calls_most = name, calls_left, calls_left
        self.refresh_token = f"1//sim-refresh-{name}"
        self.access_token = f"ya29.sim-{name}-0"
        self.generation = 0         # of the access token
        self.faults: collections.deque = collections.deque()
        self.calls = 0
        self.cli_project = ""       # "" is no licence: the Gemini CLI pool is absent
        self.onboarding = 0         # polls until a project is made for it
        self.tier = "free-tier"


def sim_load(account: SimAccount, body: Mapping) -> dict:
    """loadCodeAssist: two pools give two verdicts on one account."""
    answer: dict = {"currentTier": {"id": account.tier},
                    "allowedTiers": [{"id": "free-tier", "isDefault": True}]}
    if body.get("metadata", {}).get("ideType") != "ANTIGRAVITY":
        if account.cli_project:
            return {**answer, "cloudaicompanionProject": account.cli_project}
        return {**answer, "ineligibleTiers": [{
            "reasonCode": "UNSUPPORTED_CLIENT", "tierId": "free-tier",
            "reasonMessage": "This client is no longer supported for Gemini Code Assist"}]}
    if not account.onboarding:
        answer["cloudaicompanionProject"] = {"id": "sim-project-" + account.name}
    return answer


def sim_quota(account: SimAccount, method: str) -> dict:
    """The three quota calls: what is left of the account's calls, zeros omitted as proto3 does."""
    left = 1.0 if account.calls_most is None else max(0, account.calls_left) / account.calls_most
    row: dict = {"resetTime": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 8486))}
    if left:
        row["remainingFraction"] = left
    if method == "retrieveUserQuota":
        return {"buckets": [{"modelId": m, "tokenType": "REQUESTS", **row}
                            for m in GEMINI_CLI_IDS.values()]}
    if method == "retrieveUserQuotaSummary":
        return {"groups": [{"displayName": group, "buckets": [
            {"bucketId": f"{group}-{window}", "window": window, **row}
            for window in ("5h", "weekly")]} for group in ("gemini", "3p")]}
    return {"models": {m.id: {"displayName": m.label, "maxTokens": m.context_tokens,
                              "maxOutputTokens": m.output_tokens, "quotaInfo": row}
                       for m in MODELS.values() if m.on_cloud_code}}


def _sim_frames(fault: str, events: Iterable, broken: dict, place: int) -> Iterator[str]:
    """Events as text, None being Chat's end, up to where a fault ends them: `place`, or at once."""
    for position, event in enumerate(events):
        is_over = position == place and fault in ("mid_cut", "mid_error")
        if fault in ("cut", "empty") or is_over and fault == "mid_cut":
            return
        event = broken if is_over else event
        name = f"event: {event['type']}\n" if event and "type" in event else ""
        yield f"{name}data: {json_encode(event) if event else '[DONE]'}\n\n"
        if is_over:
            return


class SimHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Any         # the SimUpstream below

    def log_message(self, *args: Any) -> None:
        pass        # the proxy's log is the one to read

    def do_GET(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        if url.path in ("/auth", "/sim/consent"):
            return self._consent(url.path, query)
        account = self._account()
        if url.path == "/userinfo" and account:
            return self._json(200, {"email": account.name + "@sim.example"})
        if url.path == "/v1/models" and "anthropic-version" in self.headers:
            rows = [{"id": "claude-opus-4-8", "type": "model", "display_name": "Claude Opus 4.8"}]
            return self._json(200, {"data": rows}) if account else self._native_error("auth")
        if url.path == "/v1/models":
            rows = [{"id": "gpt-sim", "object": "model", "created": 1, "owned_by": "sim",
                     "context_length": 128000}]
            return self._json(200, {"object": "list", "data": rows}) if account else (
                self._openai_error("auth"))
        if url.path == "/v1beta/models":
            wrong = sim_error(400, "API key not valid. Please pass a valid API key.",
                              "API_KEY_INVALID")
            return self._json(*((200, {"models": []}) if account else wrong))
        self._json(*SIM_FAULTS["missing"])

    def _consent(self, path: str, query: dict) -> None:
        """The vendor's page: a link for each account and one to refuse; a click leads back."""
        back = {"state": query.get("state", "")}
        if path == "/sim/consent" and query.get("account"):
            back["code"] = "4/sim-" + os.urandom(12).hex()
            with self.server.lock:
                self.server.codes[back["code"]] = query
        elif path == "/sim/consent":
            back["error"] = "access_denied"
        else:
            links = "".join(
                f'<p><a id="{name or "deny"}" href="/sim/consent?'
                f'{urllib.parse.urlencode({**query, "account": name}).replace("&", "&amp;")}">'
                f'{name or "Refuse"}</a></p>' for name in (*self.server.accounts, ""))
            return self._send(200, "text/html", f"<h1>Simulated sign-in</h1>{links}".encode())
        self._head(302, {"Location": f"{query.get('redirect_uri', '')}?"
                                     f"{urllib.parse.urlencode(back)}", "Content-Length": "0"})

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("content-length") or 0))
        path = self.path.partition("?")[0]
        if path == "/token":
            return self._json(*self._token(dict(urllib.parse.parse_qsl(raw.decode()))))
        if path == "/sim/faults":
            try:
                order = json.loads(raw)
                self.server.plan(order["account"], *order["faults"])
            except (ValueError, LookupError, TypeError):
                return self._json(400, {"body": {"account": "one of accounts", "faults": ["..."]},
                                        "accounts": list(self.server.accounts),
                                        "faults": [*SIM_FAULTS, *SIM_STREAM_FAULTS]})
            return self._json(200, {})
        account = self._account()
        body = json.loads(raw)
        is_native = path.startswith("/v1/messages")
        if account is None and path.startswith(("/v1/chat", "/v1/responses")):
            return self._openai_error("auth")
        if account is None:
            return self._native_error("auth") if is_native else self._json(*SIM_FAULTS["auth"])
        if is_native:
            return self._native(account, body, path)
        if path in ("/v1/chat/completions", "/v1/responses"):
            return self._openai(account, body, path.endswith("completions"))
        if path.endswith(":countTokens") and path.startswith("/v1beta/"):
            return self._json(200, {"totalTokens": len(json_encode(body)) // 4})
        match = re.fullmatch(r"/(?:v1internal|v1beta/models/([^:]+)):(g|streamG)enerateContent",
                             path)
        if match:
            return self._generate(account, body, match[1], match[2] == "g")
        self._json(*self._discovery(account, path.rpartition(":")[2], body))

    def _discovery(self, account: SimAccount, method: str, body: Mapping) -> tuple:
        with self.server.lock:
            if method == "loadCodeAssist":
                self.server.discoveries += 1
                return 200, sim_load(account, body)
            if method == "onboardUser":
                account.onboarding = max(0, account.onboarding - 1)
                done = {"done": True, "response": {"cloudaicompanionProject": {
                    "id": "sim-project-" + account.name}}}
                return 200, {"name": "operations/1", **({} if account.onboarding else done)}
            if method in ("fetchAvailableModels", "retrieveUserQuotaSummary", "retrieveUserQuota"):
                self.server.quota_reads += 1
                return 200, sim_quota(account, method)
        return SIM_FAULTS["missing"]

    def _account(self) -> SimAccount | None:
        bearer = (self.headers.get("authorization") or "").partition(" ")[2]
        key = self.headers.get("x-goog-api-key") or self.headers.get("x-api-key")
        with self.server.lock:
            return next((a for a in self.server.accounts.values()
                         if bearer == a.access_token or "sim-key-" + a.name in (key, bearer)),
                        None)

    def _token(self, form: Mapping[str, str]) -> tuple:
        """(status, answer) of both grants: client, redirect and PKCE are checked."""
        server, accounts = self.server, self.server.accounts
        with server.lock:
            server.refreshes += 1
            if server.token_faults:
                return server.token_faults.popleft()
            if (form.get("client_id"), form.get("client_secret")) != ("sim-client", "sim-secret"):
                return 401, {"error": "invalid_client"}
            if form.get("grant_type") == "authorization_code":
                asked = server.codes.pop(form.get("code", ""), None)
                digest = hashlib.sha256(form.get("code_verifier", "").encode()).digest()
                challenge = base64url(digest)
                if asked and asked.get("redirect_uri") != form.get("redirect_uri"):
                    return 400, {"error": "redirect_uri_mismatch"}
                account = accounts.get(asked["account"]) if asked and (
                    asked.get("code_challenge") == challenge) else None
            else:
                account = next((a for a in accounts.values()
                                if a.refresh_token == form.get("refresh_token")), None)
            if account is None:
                return 400, {"error": "invalid_grant", "error_description": "Bad Request"}
            account.generation += 1
            account.access_token = f"ya29.sim-{account.name}-{account.generation}"
            answer = {"access_token": account.access_token, "expires_in": 3599,
                      "token_type": "Bearer"}
            if server.rotates_tokens:
                account.refresh_token = f"1//sim-refresh-{account.name}-{account.generation}"
            if server.rotates_tokens or "code" in form:
                answer["refresh_token"] = account.refresh_token
            return 200, answer

    def _json(self, status: int, value: Any, **headers: str) -> None:
        self._send(status, "application/json", json_encode(value).encode(), **headers)

    def _send(self, status: int, content_type: str, data: bytes, **headers: str) -> None:
        self._head(status, {"Content-Type": content_type, "Content-Length": str(len(data)),
                            **headers})
        self.wfile.write(data)

    def _head(self, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name, text)
        self.end_headers()

    def _send_events(self, fault: str, events: Iterable[str], headers: Mapping[str, str]) -> None:
        """A stream of SSE, paced; one that is cut has no end."""
        is_cut = fault in ("cut", "mid_cut")
        self.close_connection = self.close_connection or is_cut
        with self.server.lock:
            self.server.open_streams += 1
        try:
            self._head(200, {**headers, "Transfer-Encoding": "chunked"})
            for event in events:
                if self.server.pace_s and self.server.stop_event.wait(self.server.pace_s):
                    return
                self.wfile.write(chunk(event.encode()))
            if not is_cut:
                self.wfile.write(LAST_CHUNK)
        finally:
            with self.server.lock:
                self.server.open_streams -= 1

    def _next_fault(self, account: SimAccount, body: Mapping) -> str:
        """What the account's present call has to suffer; the call is counted."""
        with self.server.lock:
            self.server.requests.append((account.name, body))
            account.calls += 1
            return account.faults.popleft() if account.faults else ""

    def _native_error(self, fault: str, message: str = "", **headers: str) -> None:
        status, word, told = SIM_NATIVE_FAULTS[fault]
        self._json(status, {"type": "error", "request_id": "req_sim",
                            "error": {"type": word, "message": message or told}}, **headers)

    def _breaks(self, fault: str) -> bool:
        """Whether the fault is an answer that is none."""
        if fault in SIM_BODIES:
            self._send(*SIM_BODIES[fault])
        elif fault == "stall":
            self.server.stop_event.wait(3600)
        self.close_connection = self.close_connection or fault == "reset"
        return fault in SIM_BODIES or fault in ("stall", "reset")

    def _native(self, account: SimAccount, body: dict, path: str) -> None:
        """Anthropic's part: messages streamed and whole, and token counts."""
        fault = self._next_fault(account, body)
        if self._breaks(fault):
            return None
        if fault in SIM_NATIVE_FAULTS:
            return self._native_error(fault, **{"retry-after": "3600"} if fault == "quota" else {})
        refused = sim_native_refuses({"max_tokens": 1, **body} if "count" in path else body)
        if refused:
            self.server.refusals.append(refused)
            return self._native_error("bad", refused)
        if path.endswith("/count_tokens"):
            return self._json(200, {"input_tokens": len(json_encode(body)) // 4})
        message = sim_native_answer(body)
        if fault == "empty":
            message.update(content=[], stop_reason="end_turn")
            fault = ""
        if not body.get("stream"):
            return self._json(200, message)
        broken = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
        self._send_events(fault, _sim_frames(fault, sim_native_events(message), broken, 5), {
            "Content-Type": "text/event-stream; charset=utf-8", "request-id": "req_sim",
            "anthropic-ratelimit-requests-remaining": "41"})

    def _openai_error(self, fault: str, message: str = "", code: str = "", **headers: str) -> None:
        status, kind, word, told = SIM_OPENAI_FAULTS[fault]
        self._json(status, {"error": {"message": message or told, "type": kind, "param": None,
                                      "code": code or word}}, **headers)

    def _openai(self, account: SimAccount, body: dict, is_chat: bool) -> None:
        """OpenAI's part: Chat and Responses, streamed and whole."""
        fault = self._next_fault(account, body)
        if self._breaks(fault):
            return None
        if fault in SIM_OPENAI_FAULTS:
            return self._openai_error(fault)
        refused = sim_openai_refuses(body)
        if refused:
            self.server.refusals.append(refused)
            code = "unknown_parameter" if refused.startswith("Unknown") else ""
            return self._openai_error("bad", refused, code)
        _, kind, code, told = SIM_OPENAI_FAULTS["capacity"]
        broken: dict = {"error": {"message": told, "type": kind, "code": code}}
        if is_chat:
            whole, events = sim_chat(body)
        else:
            whole, broken = sim_response(body), {"type": "error", "sequence_number": 6, **broken}
            events = [{**event, "sequence_number": n}
                      for n, event in enumerate(sim_response_events(whole))]
        if not body.get("stream"):
            return self._json(200, whole)
        texts = _sim_frames(fault, [*events, None] if is_chat else events, broken, 6)
        self._send_events(fault, texts, {"Content-Type": "text/event-stream", "x-request-id": "sim",
                                         "x-ratelimit-remaining-requests": "41"})

    def _generate(self, account: SimAccount, body: dict, key_model: str | None,
                  is_whole: bool) -> None:
        """Google's part: Cloud Code's stream, and the Gemini API's streamed and whole."""
        server, is_enveloped = self.server, key_model is None
        inner = body.get("request") if is_enveloped else sim_from_key(body)
        name = body.get("model") if is_enveloped else urllib.parse.unquote(key_model)
        is_cli = "user_prompt_id" in body
        model = next((m for m in MODELS.values() if name == (
            GEMINI_CLI_IDS.get(m.key_id) if is_cli else m.id if is_enveloped else m.key_id)), None)
        fault = self._next_fault(account, body)
        with server.lock:
            if is_cli and not account.cli_project:
                fault = "unsupported_client"
            elif not fault and account.calls_left is not None and not is_cli:
                account.calls_left -= 1
                fault = "quota" if account.calls_left < 0 else ""
        if fault in SIM_FAULTS:
            return self._json(*SIM_FAULTS[fault])
        refused = "Request contains an invalid argument." if not isinstance(inner, dict) else (
            sim_refuses(inner, model, is_enveloped))
        if refused:
            server.refusals.append(refused)
            return self._json(*sim_error(400, refused))
        if self._breaks(fault):
            return None
        events = self._events(fault, inner, model, name)
        if is_whole:
            whole: dict = {}
            for event in events:
                parts = [p for c in (whole, event) for row in c.get("candidates", ())
                         for p in row["content"]["parts"]]
                whole = {**whole, **event}
                if "candidates" in whole:
                    whole["candidates"][0]["content"]["parts"] = parts
            return self._json(200, whole)
        wrapped = ({"response": e} if is_enveloped and "error" not in e else e for e in events)
        texts = (f"data: {json_encode(event)}\r\n\r\n" for event in wrapped)
        self._send_events(fault, texts, {"Content-Type": "text/event-stream"})

    def _events(self, fault: str, inner: Mapping, model: Model | None,
                name: str) -> Iterator[dict]:
        """The chunks of one answer, usage cumulative in each."""
        prompt = len(json_encode(inner)) // 4
        session = str(inner.get("sessionId", ""))
        with self.server.lock:
            cached = min(self.server.cached.get(session, 0), prompt)
            self.server.cached[session] = prompt
        usage = {"promptTokenCount": prompt, "cachedContentTokenCount": cached,
                 "candidatesTokenCount": 0, "thoughtsTokenCount": 0}

        def event(parts: list[dict], finish: str = "") -> dict:
            usage["candidatesTokenCount"] += sum(1 + len(json_encode(p)) // 8 for p in parts)
            usage["totalTokenCount"] = (prompt + usage["candidatesTokenCount"]
                                        + usage["thoughtsTokenCount"])
            candidate: dict = {"content": {"role": "model", "parts": parts}, "index": 0}
            if finish:
                candidate["finishReason"] = finish
            return {"candidates": [candidate], "usageMetadata": dict(usage), "modelVersion": name,
                    "responseId": "sim-response"}

        if fault == "blocked":
            yield {"promptFeedback": {"blockReason": "SAFETY"},
                   "usageMetadata": {"promptTokenCount": prompt}}
        elif fault in ("empty", "malformed"):
            yield event([], "STOP" if fault == "empty" else "MALFORMED_FUNCTION_CALL")
        elif fault == "error_event":
            yield SIM_FAULTS["capacity"][1]
        elif fault != "cut":
            yield from self._content(fault, inner, model, event, usage)

    def _content(self, fault: str, inner: Mapping, model: Model | None, event: Any,
                 usage: dict) -> Iterator[dict]:
        family = model.family if model else "gemini3"
        signature = ("Rsim" if family == "claude" else "simg") + os.urandom(30).hex()
        if inner.get("generationConfig", {}).get("thinkingConfig", {}).get("includeThoughts"):
            usage["thoughtsTokenCount"] = 12
            yield event([{"text": "Thinking about ", "thought": True}])
            yield event([{"text": "the request.", "thought": True}])
            if family == "claude":
                yield event([{"thought": True, "text": "", "thoughtSignature": signature}])
        if fault == "thoughts_only":
            yield event([], "STOP")
            return
        if any("googleSearch" in tool for tool in inner.get("tools", ())):
            yield event([{"text": "Über agproxy: it is a proxy."}])
            answer = event([{"text": ""}], "STOP")
            answer["candidates"][0]["groundingMetadata"] = {
                "webSearchQueries": ["agproxy"], "groundingChunks": [
                    {"web": {"uri": "https://example.org/a", "title": "About agproxy"}}],
                "groundingSupports": [{"groundingChunkIndices": [0], "segment": {
                    "startIndex": 15, "endIndex": 29, "text": "it is a proxy."}}]}
            yield answer
            return
        for position, parts in enumerate(sim_agent(inner)):
            calls = [p for p in parts if "functionCall" in p]
            for call in calls if family in ("claude", "gemini3") else ():
                prefix = "toolu_vrtx_" if family == "claude" else "fc_"
                call["functionCall"]["id"] = prefix + os.urandom(8).hex()
            if calls and family == "gemini3":
                calls[0]["thoughtSignature"] = signature
            yield event(parts)
            if fault == "mid_error" and position == 1:
                yield SIM_FAULTS["quota"][1]
                return
            if fault == "mid_cut" and position == 1:
                return
        yield event([{"text": ""}], "SAFETY" if fault == "safety" else "STOP")


class SimUpstream(http.server.ThreadingHTTPServer):
    """All of them on a free port of 127.0.0.1, with Google's sign-in page /auth, /token, /userinfo.
    `accounts` maps names to how many generating calls are left before Google's quota 429 (None: no
    end).  `pace_s` is the time between events.  Its OAuth client is `sim-client` with `sim-secret`,
    its keys are `sim-key-<account>`.  The lock guards everything mutable."""
    request_queue_size = 256
    daemon_threads = True

    def __init__(self, accounts: Mapping[str, int | None], pace_s: float = 0.0):
        self.lock = threading.Lock()
        self.accounts = {name: SimAccount(name, left) for name, left in accounts.items()}
        self.pace_s, self.refreshes, self.discoveries, self.quota_reads = pace_s, 0, 0, 0
        self.rotates_tokens = False
        self.token_faults: collections.deque = collections.deque()  # (status, answer), in turn
        self.codes: dict[str, dict] = {}        # authorization code -> what it was asked with
        # (account, envelope or body)
        self.requests: collections.deque = collections.deque(maxlen=500)
        self.refusals: collections.deque = collections.deque(maxlen=500)    # texts of its 400s
        self.open_streams = 0
        self.cached: dict[str, int] = {}        # session id -> tokens of its last prompt
        self.stop_event = threading.Event()
        super().__init__(("127.0.0.1", 0), SimHandler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.05,), name="sim", daemon=True).start()

    def plan(self, account: str, *faults: str) -> None:
        """The next calls of `account` fail so, one fault a call."""
        unknown = [f for f in faults if f not in SIM_FAULTS and f not in SIM_STREAM_FAULTS]
        if unknown:
            raise ValueError(f"no such fault: {unknown[0]}")
        with self.lock:
            self.accounts[account].faults.extend(faults)

    def stop(self) -> None:
        self.stop_event.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass        # clients hang up on purpose here

    def server_bind(self) -> None:      # no reverse look-up of the host name
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()


class SimElsewhere(NamedTuple):
    """A simulator that another process runs."""
    url: str
    accounts: Mapping[str, SimAccount]

    def stop(self) -> None:
        """Its process does."""


def sim_provider(sim: SimUpstream | SimElsewhere, provider: Provider) -> Provider:
    """The row with every address of the simulator in place of its own."""
    ends = tuple((d, (sim.url + "/v1" * (d in ("chat", "responses")),)) for d, _ in (
        (provider.dialect, ()), *provider.endpoints))
    return provider._replace(
        base_urls=ends[0][1], endpoints=ends[1:], quota="",
        token_url=sim.url + "/token", auth_url=sim.url + "/auth",
        userinfo_url=sim.url + "/userinfo", client_id="sim-client", client_secret="sim-secret")


def sim_config(sim: SimUpstream | SimElsewhere, config: Config) -> Config:
    """`config` with the simulated accounts in place of the owner's."""
    accounts = tuple({"name": a.name, "provider": "sim", "refresh_token": a.refresh_token}
                     for a in sim.accounts.values())
    return replace(config, providers={
        name: sim_provider(sim, row) for name, row in config.providers.items()}, accounts=accounts)


# What `bench` measures by: the bodies.  They are the same in every run and on every machine.

BENCH_WORDS = ("the of function return value config server request stream token file path index "
               "error test module import class update handler parser buffer thread socket header "
               "timeout result array object string number check write read open close retry cache "
               "branch merge review patch — naïve café <T> &amp; \"quoted\" it's").split()
BENCH_MODEL = "claude-sonnet-4-6"
BENCH_LARGE_BYTES = 130_000         # a Claude Code request in the middle of a working day
BENCH_PATIENCE_S = 15               # for answers that are late at the end of a load
BENCH_MARK = b"~"                   # once in the text of each event and nowhere else: counts them
BENCH_STAMP = re.compile(rb"~(\d{16})")     # ... and when it left: system-wide clock, microseconds
_BENCH_NUMBER = "#00000000"         # a request's own number: none is the repetition of another
_BENCH_HEAD = (
    "POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    "Accept: application/json\r\nAccept-Encoding: identity\r\nanthropic-version: 2023-06-01\r\n"
    "anthropic-beta: claude-code-20250219,interleaved-thinking-2025-05-14\r\nx-api-key: bench\r\n"
    "Authorization: Bearer bench\r\nUser-Agent: claude-cli/2.0.1 (external, cli)\r\nx-app: cli\r\n"
    "X-Stainless-Lang: js\r\nX-Stainless-Runtime: node\r\nX-Stainless-Retry-Count: 0\r\n"
    "X-Stainless-Timeout: 600\r\nContent-Length: {length}\r\n\r\n")


def bench_text(seed: int, length: int) -> str:
    """`length` characters of words; the same seed gives the same."""
    words, size = [], 0
    while size < length:
        seed = (seed * 1103515245 + 12345) % 2 ** 31
        words.append(BENCH_WORDS[(seed >> 8) % len(BENCH_WORDS)])
        size += len(words[-1]) + 1
    return " ".join(words)[:length]


def _bench_tool(number: int) -> dict:
    texts = {f"p{n}": {"type": "string", "description": bench_text(number * 9 + n, 90)}
             for n in range(6)}
    rows = {"type": "array", "items": {"type": "object", "required": ["content"], "properties": {
        "content": {"type": "string", "minLength": 1}, "status": {"enum": ["open", "done"]}}}}
    return {"name": "mcp__server__op%d" % number if number else "Bash",
            "description": bench_text(number, 400), "input_schema": {
                "$schema": "http://json-schema.org/draft-07/schema#", "type": "object",
                "properties": {**texts, "items": rows}, "required": ["p0"],
                "additionalProperties": False}}


def bench_body(size_bytes: int, turns: int, is_streaming: bool = False,
               max_tokens: int = 32_000, is_new: bool = False) -> dict:
    """An Anthropic request of that size as Claude Code makes it: 20 KB of system prompt and 30
    tools (fewer below 130 KB), `turns` pairs of call and result, which take what is left.  Its
    number ends it, as a conversation goes on, or begins it: `is_new`."""
    share = min(1.0, size_bytes / BENCH_LARGE_BYTES)
    told: list[dict] = [{"type": "text", "text": bench_text(1, 200)}]
    messages = [{"role": "user", "content": told}]
    for turn in range(turns):
        call, told = f"toolu_{turn:024d}", [{"type": "tool_result", "content": []}]
        told[0]["tool_use_id"] = call
        messages += [{"role": "assistant", "content": [
            {"type": "text", "text": bench_text(turn, 120)},
            {"type": "tool_use", "id": call, "name": "Bash",
             "input": {"command": bench_text(turn, 60)}}]}, {"role": "user", "content": told}]
    numbered = {"type": "text", "text": f"request {_BENCH_NUMBER}"}
    messages[0 if is_new else -1]["content"].insert(0 if is_new else len(told), numbered)
    body = {"model": BENCH_MODEL, "max_tokens": max_tokens, "stream": is_streaming,
            "messages": messages,
            "system": [{"type": "text", "text": bench_text(2, int(20_000 * share)),
                        "cache_control": {"type": "ephemeral"}}]}
    if turns:
        body["tools"] = [_bench_tool(n) for n in range(max(1, int(30 * share)))]
    left = size_bytes - len(json_encode(body))
    for turn in range(turns):
        messages[2 * turn + 2]["content"][0]["content"] = [
            {"type": "text", "text": bench_text(turn, max(0, left // turns - 26))}]
    if not turns:
        told[-1]["text"] += bench_text(3, max(0, left))
    return body


class BenchRequest(NamedTuple):
    """The bytes of a request around its number, and what its answer must end with."""
    port: int
    before: bytes
    after: bytes
    ending: bytes

    def numbered(self, number: int) -> bytes:
        return b"%s%08d%s" % (self.before, number % 10 ** 8, self.after)


def bench_request(port: int, path: str, body: Mapping, ending: bytes) -> BenchRequest:
    text = json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    head = _BENCH_HEAD.format(path=path, host=f"127.0.0.1:{port}", length=len(text))
    before, number, after = (head.encode("ascii") + text).partition(_BENCH_NUMBER.encode("ascii"))
    return BenchRequest(port, before + number[:1], after, ending)


# ... the upstream: bytes made beforehand, one thread, one selector, so that it costs less than
# any proxy (the simulator above understands what it is asked: it would be what is measured)

_BENCH_LENGTH = re.compile(rb"(?i)\r\n(?:content-length: *(\d+)|transfer-encoding: *chunked)")
_BENCH_SSE = (b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
              b"Transfer-Encoding: chunked\r\n\r\n")


class BenchLine:
    """A socket of a selector that never blocks.  What does not go out at once follows when it can;
    `whole` tells when a message, request or answer, has come in."""
    __slots__ = ("sock", "selector", "seen", "left", "end", "asked_at", "first_at", "looked_at")

    def __init__(self, sock: socket.socket, selector: selectors.BaseSelector):
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock, self.selector = sock, selector
        self.seen, self.left = bytearray(), b""
        self.end = 0                    # length of the message that comes in; -1: chunked
        # a client's: times, 0 for none, and where stamps end
        self.asked_at, self.first_at, self.looked_at = 0.0, 0.0, 0
        selector.register(sock, selectors.EVENT_READ, self)

    def send(self, data: bytes) -> None:
        if self.left:
            self.left = bytes(self.left) + data
            return
        try:
            sent = self.sock.send(data)
        except OSError as err:          # a connection that is being made is not ready either
            if err.errno not in (errno.EAGAIN, errno.EWOULDBLOCK, errno.ENOTCONN):
                raise
            sent = 0
        if sent < len(data):
            self.left = memoryview(data)[sent:]
            self.selector.modify(self.sock, selectors.EVENT_READ | selectors.EVENT_WRITE, self)

    def flush(self) -> None:
        self.left = self.left[self.sock.send(self.left):]
        if not self.left:
            self.selector.modify(self.sock, selectors.EVENT_READ, self)

    def read(self) -> bytes:
        data = self.sock.recv(262144)
        self.seen += data
        return data

    def whole(self) -> int:
        """Length of the message, 0 as long as it is not whole."""
        if not self.end:
            cut = self.seen.find(b"\r\n\r\n") + 4
            if cut == 3:
                return 0
            found = _BENCH_LENGTH.search(self.seen, 0, cut)
            self.end = cut if not found else cut + int(found[1]) if found[1] else -1
        if self.end < 0:
            return len(self.seen) if self.seen.endswith(b"\r\n" + LAST_CHUNK) else 0
        return self.end if len(self.seen) >= self.end else 0

    def take(self, length: int) -> None:
        del self.seen[:length]
        self.end = 0

    def close(self) -> None:
        if self.sock.fileno() >= 0:
            self.selector.unregister(self.sock)
            self.sock.close()


BENCH_DIRECT = f"/v1beta/models/{BENCH_MODEL}:streamGenerateContent?alt=sse"


def bench_event(text: str, number: int, finish: str = "", is_enveloped: bool = True) -> bytes:
    """One event as Google writes it."""
    candidate: dict = {"content": {"role": "model", "parts": [{"text": text}]}}
    if finish:
        candidate["finishReason"] = finish
    event = {"candidates": [candidate], "usageMetadata": {
        "promptTokenCount": 31234, "candidatesTokenCount": number, "cachedContentTokenCount": 28000,
        "totalTokenCount": 31234 + number}, "modelVersion": BENCH_MODEL, "responseId": "bench"}
    event = {"response": event, "traceId": "4a1c7f0f9e9b2d5c"} if is_enveloped else event
    return b"data: %s\r\n\r\n" % json_encode(event).encode("ascii")


def bench_texts(count: int) -> list[str]:
    """The texts of `count` events: 20 to 60 characters with the mark in each, none in the last."""
    return [*(BENCH_MARK.decode() + bench_text(n, 20 + n * 7 % 40) + " " for n in range(1, count)),
            ""]


def bench_events(count: int, is_enveloped: bool = True) -> list[bytes]:
    return [bench_event(text, n, "" if text else "STOP", is_enveloped)
            for n, text in enumerate(bench_texts(count), 1)]


_BENCH_JSON = (b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
               b"Content-Length: %d\r\n\r\n%s")
# whatever else is asked, by any proxy: token, project, models, quota
_BENCH_OTHER = (b'{"access_token":"bench","expires_in":3599,"token_type":"Bearer","models":{},'
                b'"data":[],"cloudaicompanionProject":"bench",'
                b'"currentTier":{"id":"standard-tier"}}')


class BenchUpstream:
    """Cloud Code and the Gemini API on 127.0.0.1.  `POST /bench?events=N&pace=P` says how many
    events an answer has and how many of them are sent a second (0: all at once); each paced event
    carries the time at which it is sent."""

    def __init__(self, port: int = 0):
        self.listener = socket.create_server(("127.0.0.1", port), backlog=2048)
        self.listener.setblocking(False)
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.listener, selectors.EVENT_READ)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.due: collections.deque = collections.deque()   # (time, line, events left, enveloped)
        self.set_answers(20, 0.0)

    def set_answers(self, events: int, pace: float) -> None:
        self.events, self.pace = events, pace
        self.canned, self.whole, self.paced = {}, {}, {}    # by whether they are enveloped
        for kind in (True, False):
            parts = bench_events(events, kind)
            self.canned[kind] = b"".join((_BENCH_SSE, *map(chunk, parts), LAST_CHUNK))
            whole = bench_event("".join(bench_texts(events)), events, "STOP", kind)
            self.whole[kind] = _BENCH_JSON % (len(whole) - 10, whole[6:-4])
            stamped = chunk(bench_event(f"~{0:016d} lorem ipsum dolor sit amet", 1, "", kind))
            before, _, after = stamped.partition(b"0" * 16)
            self.paced[kind] = before, after, chunk(parts[-1]) + LAST_CHUNK

    def serve(self, stops: Callable[[], bool] = lambda: False) -> None:
        while not stops():
            wait = self.due[0][0] - time.perf_counter() if self.due else 0.5
            for key, mask in self.selector.select(max(0.0, wait)):
                if key.data is None:
                    with contextlib.suppress(OSError):      # it is gone already
                        BenchLine(self.listener.accept()[0], self.selector)
                else:
                    self._serve_line(key.data, mask)
            now = time.perf_counter()
            while self.due and self.due[0][0] <= now:
                self._send_next(*self.due.popleft())

    def close(self) -> None:
        for key in list(self.selector.get_map().values()):
            key.fileobj.close()
        self.selector.close()

    def _serve_line(self, line: BenchLine, mask: int) -> None:
        try:
            if mask & selectors.EVENT_WRITE:
                line.flush()
            if mask & selectors.EVENT_READ:
                if not line.read():
                    line.close()
                length = line.whole()
                if length:
                    self._answer(line, line.seen[:line.seen.find(b" HTTP/")].decode("latin-1"))
                    line.take(length)
        except OSError:         # a client that hangs up is no error of this side
            line.close()

    def _answer(self, line: BenchLine, target: str) -> None:
        if "/bench?" in target:
            asked = dict(urllib.parse.parse_qsl(target.partition("?")[2]))
            self.set_answers(int(asked["events"]), float(asked["pace"]))
        if "enerateContent" not in target:
            return line.send(_BENCH_JSON % (len(_BENCH_OTHER), _BENCH_OTHER))
        is_enveloped = "/v1internal" in target
        if ":generateContent" in target:
            return line.send(self.whole[is_enveloped])
        if not self.pace:
            return line.send(self.canned[is_enveloped])
        line.send(_BENCH_SSE)
        return self._send_next(time.perf_counter(), line, self.events - 1, is_enveloped)

    def _send_next(self, at: float, line: BenchLine, left: int, is_enveloped: bool) -> None:
        before, after, last = self.paced[is_enveloped]
        if line.sock.fileno() < 0:
            return
        try:
            line.send(b"%s%016d%s" % (before, int(time.perf_counter() * 1e6), after)
                      if left else last)
        except OSError:
            return line.close()
        if left:        # one period for all, so the queue is in order
            self.due.append((at + 1 / self.pace, line, left - 1, is_enveloped))


def bench_tell(port: int, events: int, pace: float) -> None:
    """Sets what the bench upstream answers from now on."""
    with socket.create_connection(("127.0.0.1", port), BENCH_PATIENCE_S) as sock:
        sock.sendall(b"POST /bench?events=%d&pace=%g HTTP/1.1\r\n\r\n" % (events, pace))
        sock.recv(65536)


# ... and the load: one thread and one selector for all clients

@dataclass
class BenchTally:
    """What a load saw."""
    answers: int = 0
    elapsed_s: float = 0.0
    times_s: list = field(default_factory=list)     # question to whole answer
    firsts_s: list = field(default_factory=list)    # ... to the first event
    delays_s: list = field(default_factory=list)    # of stamped events: sent to received
    failures: list = field(default_factory=list)    # sentences


class BenchClient:
    """Keep-alive connections that each ask again when their answer is whole and right: status, end
    and number of marks.  A connection that failed is not used again."""

    def __init__(self, request: BenchRequest, marks: int, is_paced: bool = False):
        self.request, self.marks, self.is_paced = request, marks, is_paced
        self.selector = selectors.DefaultSelector()
        self.lines: set[BenchLine] = set()
        self.asked = self.waiting = 0           # requests so far; of them without an answer
        self.stops_at, self.most = 0.0, 0       # nothing new is asked after that, or so many
        self.tally = BenchTally()

    def __enter__(self) -> BenchClient:
        return self

    def __exit__(self, *error: object) -> None:
        for line in list(self.lines):
            self._drop(line)
        self.selector.close()

    def open(self) -> None:
        line = BenchLine(socket.socket(), self.selector)
        self.lines.add(line)
        line.sock.connect_ex(("127.0.0.1", self.request.port))
        self._ask(line)

    def run(self, clients: int, seconds: float, requests: int = sys.maxsize) -> BenchTally:
        """Closed loops for so long or so many requests; returns when all answers are there."""
        self.tally, began = BenchTally(), time.perf_counter()
        self.stops_at, self.most = began + seconds, self.asked + requests
        for line in list(self.lines):
            self._ask(line)
        for _ in range(clients - len(self.lines)):
            self.open()
        return self._finish(began, self.stops_at + BENCH_PATIENCE_S)

    def live(self, streams: int, ramp_s: float, length_s: float,
             in_midst: Callable[[], None]) -> BenchTally:
        """`streams` at once, begun over `ramp_s`; `in_midst` is called while all are open."""
        self.tally, began = BenchTally(), time.perf_counter()
        for number in range(streams):
            self._turn(began + ramp_s * number / streams)
            self.open()
        self._turn(began + max(ramp_s, (ramp_s + length_s) / 2))
        in_midst()
        return self._finish(began, began + ramp_s + length_s + BENCH_PATIENCE_S)

    def _finish(self, began: float, deadline: float) -> BenchTally:
        """Waits for the answers that are still to come; who has none by then has failed."""
        self._turn(deadline, is_last=True)
        for line in [line for line in self.lines if line.asked_at]:
            self._fail(line, "no whole answer came in time")
        self.tally.elapsed_s = time.perf_counter() - began
        return self.tally

    def _turn(self, deadline: float, is_last: bool = False) -> None:
        """Moves all connections until then, or until no answer is awaited any more."""
        left = deadline - time.perf_counter()
        while left > 0 and (self.waiting or not is_last):
            for key, mask in self.selector.select(left):
                self._move(key.data, mask)
            left = deadline - time.perf_counter()

    def _ask(self, line: BenchLine) -> None:
        self.asked += 1
        self.waiting += 1
        line.asked_at, line.first_at, line.looked_at = time.perf_counter(), 0.0, 0
        try:
            line.send(self.request.numbered(self.asked))
        except OSError as err:
            self._fail(line, str(err))

    def _move(self, line: BenchLine, mask: int) -> None:
        try:
            if mask & selectors.EVENT_WRITE:
                line.flush()
            if mask & selectors.EVENT_READ:
                data, now = line.read(), time.perf_counter()
                if not data:
                    raise OSError("the connection was closed in mid-answer")
                self._look(line, data, now)
        except OSError as err:
            self._fail(line, str(err))

    def _look(self, line: BenchLine, data: bytes, now: float) -> None:
        if not line.first_at and BENCH_MARK in data:
            line.first_at = now
        if self.is_paced:
            for stamp in BENCH_STAMP.finditer(line.seen, line.looked_at):
                self.tally.delays_s.append(now - int(stamp[1]) / 1e6)
                line.looked_at = stamp.end()
        length = line.whole()
        if not length:
            return
        answer = bytes(line.seen[:length])
        line.take(length)
        wrong = self.wrong(answer)
        if wrong:
            return self._fail(line, wrong)
        tally = self.tally
        tally.answers += 1
        tally.times_s.append(now - line.asked_at)
        tally.firsts_s.append(line.first_at - line.asked_at)
        self._next(line, is_kept=b"\r\nconnection: close" not in answer[:2000].lower())

    def _next(self, line: BenchLine, is_kept: bool) -> None:
        """After an answer: another question, unless the load is over."""
        line.asked_at = 0.0
        self.waiting -= 1
        is_over = time.perf_counter() >= self.stops_at or self.asked >= self.most
        if self.is_paced or not is_kept:
            self._drop(line)
            if not self.is_paced and not is_over:
                self.open()
        elif not is_over:
            self._ask(line)

    def wrong(self, answer: bytes) -> str:
        """What is wrong with an answer; empty: nothing."""
        head, _, body = answer.partition(b"\r\n\r\n")
        status, marks = head[9:12].decode("latin-1"), body.count(BENCH_MARK)
        if status != "200":
            return f"status {status}: {body[:200].decode('utf-8', 'replace')}"
        if self.request.ending not in body:
            return "an answer without its end"
        return "" if marks == self.marks else f"{marks} events came of {self.marks}"

    def _fail(self, line: BenchLine, reason: str) -> None:
        self.tally.failures.append(reason)
        self.waiting -= 1
        self._drop(line)

    def _drop(self, line: BenchLine) -> None:
        self.lines.discard(line)
        line.close()


# ── 19. Terminal ──────────────────────────────────────────────────────────
# The pool's report as lines of text, for `accounts list`, `quota` and `why`.
# Knows only the report; an unknown fraction is shown as unknown.

BAR_WIDTH = 12


def quota_bar(fraction: float | None, is_ascii: bool) -> str:
    full, empty = ("#", ".") if is_ascii else ("█", "░")
    if fraction is None:
        return "?" * BAR_WIDTH + "    ?"
    filled = int(fraction * BAR_WIDTH + 0.5)
    return full * filled + empty * (BAR_WIDTH - filled) + f" {fraction:4.0%}"


def _window_line(row: Mapping, now: float, is_ascii: bool) -> str:
    parts = [f"    {row['pool'][:12]:13}{row['scope'][:26]:27}{row['window'][:9]:10}"
             + quota_bar(row["fraction"], is_ascii)]
    if row["reset_at"] > now:
        parts.append(f"resets in {human_s(row['reset_at'] - now)}")
    if row["trend"] == "burning":
        parts.append(f"{-row['per_hour']:.0%}/h, empty in {human_s(row['empty_in_s'])}")
    if row["is_stale"]:
        parts.append(f"read {human_s(now - row['read_at'])} ago")
    return "  ".join(parts)


def status_lines(report: Iterable[Mapping], now: float, is_ascii: bool = False,
                 models: bool = False) -> list[str]:
    """Each account with its state, its quota windows (those of single models with `models`, or
    where no group is known) and what limits it."""
    lines = []
    for row in report:
        used = f"used {human_s(now - row['last_used_at'])} ago" if row["last_used_at"] else ""
        lines.append("  ".join(filter(None, (
            f"{row['name'][:19]:20}{row['provider'][:13]:14}{row['tier'] or '-':7}{row['state']}",
            f"last choice: health {row['health']}" if row["health"] < HEALTH_LEAST else "", used,
            row["reason"]))))
        groups = [q for q in row["quotas"] if q["window"] != "model"]
        pools = {q["pool"] for q in groups}
        lines += [_window_line(q, now, is_ascii) for q in row["quotas"]
                  if models or q["window"] != "model" or q["pool"] not in pools]
        lines += [f"    {pool['pool'][:12]:13}absent: {pool['absent']}" for pool in row["pools"]
                  if pool["absent"]]
        lines += [f"    {limit['kind']:10}{limit['scope']}: free in "
                  f"{human_s(limit['until'] - now)}{'' if limit['is_stated'] else ' (a guess)'}"
                  for limit in row["limits"] if limit["until"] < float("inf")]
    return lines


def sheet_lines(sheet: Iterable[Mapping]) -> list[str]:
    """A score sheet, one candidate a line with every term of its score."""
    lines = []
    for row in sheet:
        free = f", free in {human_s(row['free_in_s'])}" if "free_in_s" in row else ""
        line = (f"    {row['account'][:19]:20}{row['pool'][:12]:13}{row['state']:9}"
                f"{row['reason']}{free}")
        if "score" in row:
            terms = " ".join(f"{name} {points:g}" for name, points in row["terms"].items()
                             if points)
            line += f"  score {row['score']:g} = {terms}"
        lines.append(line.rstrip())
    return lines


# ── 20. Commands ──────────────────────────────────────────────────────────
# A command parses, calls one function of a room above, prints, and returns an
# exit code: 0 fine, 1 failure, 2 usage, 4 needs an account or a login, 5 all
# exhausted.

DEMO_ACCOUNTS = {"demo-1": 6, "demo-2": None, "demo-3": None}     # calls until the quota 429
DEMO_PACE_S = 0.02
_WEAK_KEYS = (      # words of samples, and of the README's own examples
    "changeme", "change-me", "sk-test", "your", "password", "secret", "example", "sample", "dummy",
    "test-", "placeholder", "default", "agproxy", "proxy_api_key", "12345", "abcde", "qwerty")


SOURCE = os.path.abspath(__file__)      # also where its bytecode runs
if SOURCE.endswith(".pyc"):
    import importlib.util
    with contextlib.suppress(ValueError):       # bytecode that somebody put elsewhere
        SOURCE = importlib.util.source_from_cache(SOURCE)


def program_file() -> str:
    """What starts this program once more; its bytecode may have been swept away meanwhile."""
    path = os.path.abspath(__file__)
    return path if os.path.exists(path) else SOURCE


def say(*lines: str) -> None:
    for line in lines:
        try:
            print(line, flush=True)
        except UnicodeEncodeError:          # an old code page
            print(line.encode("ascii", "replace").decode("ascii"), flush=True)


def warn(text: str) -> None:
    print(f"agproxy: {redact(text)}", file=sys.stderr, flush=True)


def ask_person(question: str) -> str:
    """A line from the terminal or standard input; raises ConfigError at its end."""
    print(question, end="", flush=True, file=sys.stderr)
    line = sys.stdin.readline()
    if not line:
        raise ConfigError("standard input ended before an answer came")
    return line.strip()


def check_bind(config: Config, is_first: bool = True) -> None:
    """No address beyond loopback without a key that is worth the name; and what is wrong with the
    certificate is said before anything begins."""
    is_secure = tls_context(config) is not None
    if config.host in ("127.0.0.1", "localhost", "::1"):
        return
    key = config.api_key
    is_weak = len(key) < 16 or len(set(key)) < 8 or any(w in key.lower() for w in _WEAK_KEYS) or (
        key in (key + key)[1:-1])       # one part, over and over
    if is_weak and (key or not config.users):       # users' keys are known by their hashes only
        raise ConfigError(f"listening on {config.host} needs PROXY_API_KEY: at least 16 "
                          "characters that cannot be guessed, not from documentation")
    if is_first and not is_secure:
        warn(f"clients reach {config.host} without TLS: whoever is on the way reads their keys and "
             "prompts; --tls-cert and --tls-key change that")


def touch_account(services: Services, candidate: Candidate) -> None:
    """One small request, so that a quota window begins; its answer is of no interest."""
    class Nobody:
        """The client of a request that nobody waits for."""
        route, more_headers, headers, state, pipe = "", {}, {}, None, None

        def wait(self, sock: Any, seconds: float) -> None:
            if not readable([sock], min(seconds, 30)):
                raise ProxyError("stall", "no answer")

        pause = wake = render = aim = lambda *_: ""

    request = Request(candidate.model.id, (Turn("user", (Text("Hi"),)),), max_tokens=1)
    conducting = Conducting(services, request, Nobody(), Record("touch"))
    with services.pool.borrow(candidate) as lease:
        try:
            conducting._try(lease, True)
        except ProxyError as err:
            lease.settle(err)
            services.log.line("%s: its window was not started: %s", candidate.account.label, err)


@contextlib.contextmanager
def services_for(args: argparse.Namespace, log: Log, flags: Mapping[str, Any],
                 recovers: bool = False) -> Iterator[Services]:
    """Everything behind a server, or behind a command that needs the pool: the files, the accounts
    and calls upstream, with --demo to the simulator.  Closed on the way out."""
    told = getattr(args, "as_worker", None)
    path, clock = "" if args.demo else config_path(args.accounts, os.environ), Clock()
    # what workers share; a process that simulates alone shares nothing
    kept = os.path.join(told.folder, "accounts.json") if told and told.folder else path
    config = load_config(path, flags, os.environ, {} if args.demo else None, recovers)
    if recovers and path:
        keep_last_good(path)
    sim = None
    if args.demo:
        sim = (SimElsewhere(told.simulator, {name: SimAccount(name) for name in DEMO_ACCOUNTS})
               if told else SimUpstream(DEMO_ACCOUNTS, DEMO_PACE_S))
        config = sim_config(sim, config)
    state = State(os.path.join(os.path.dirname(os.path.realpath(kept)), "state.db") if kept else "",
                  warn, config.max_state_bytes)
    state.is_shared = told is not None
    pool = AccountPool([account_from_row(row, config.providers) for row in config.accounts],
                       clock, config.settings, state)

    def apply(edited: Config) -> None:
        services.config = edited
        pool.replace([account_from_row(row, edited.providers) for row in edited.accounts],
                     edited.settings)
    file = AccountsFile(path, flags, log, apply)
    connections = ConnectionCache(clock, os.environ, lambda: services.config.settings)
    tokens = Tokens(connections, clock, small_call_error, kept, file.keep_token)
    services = Services(config, pool, connections, clock, log, Meters(), Memory(clock, state),
                        tokens, Calibration(clock, state), state, Replies(clock, state),
                        simulator=sim.url if sim else "", workers=getattr(args, "workers", 1))
    services.keeper = Keeper(pool, tokens, file.watch, log,
                             lambda candidate: touch_account(services, candidate),
                             is_first=not told or told.number == 1)
    try:
        yield services
    finally:
        services.keeper.stop()
        file.save_tokens("is lost with this process; sign in anew")
        connections.close()
        state.close()
        if sim:
            sim.stop()
        log.close()


@contextlib.contextmanager
def bind_errors(config: Config) -> Iterator[None]:
    try:
        yield
    except OSError as err:
        raise ConfigError(f"{config.host}:{config.port} cannot be listened on: {err.strerror}; "
                          "choose another with --port") from err


@contextlib.contextmanager
def running_proxy(args: argparse.Namespace, log_out: Any) -> Iterator[ProxyServer]:
    """A listening server with everything behind it; drained on the way out."""
    flags = {name: getattr(args, name, None) for name in SETTINGS}
    if not args.demo:
        folder, name = os.path.split(os.path.realpath(config_path(args.accounts, os.environ)))
        sweep_temporaries(folder, name)
        sweep_temporaries(os.path.join(folder, "tokens"))
    with services_for(args, Log(log_out), flags, recovers=True) as services:
        config = services.config
        told = getattr(args, "as_worker", None)
        check_bind(config, not told)
        with bind_errors(config):
            listener = told and shared_listener(config.host, config.port, told.listener)
            server = ProxyServer(services, config.host, config.port, listener)
        threading.Thread(target=server.serve_forever, args=(0.1,), name="accept",
                         daemon=True).start()
        services.keeper.start()
        try:
            yield server
        finally:
            server.drain(services.config.drain_s)


def return_memory() -> None:
    """Gives freed memory back to the system, which glibc does not do by itself where large bodies
    left it between small things."""
    import ctypes
    with contextlib.suppress(AttributeError, OSError, TypeError):       # another C library
        ctypes.CDLL(None).malloc_trim(0)


def live_until(heard: list[int], alive: Any = None) -> None:
    """Returns when a signal was `heard` or the file `alive` ended; memory is returned meanwhile.  A
    handler only appends: an event's lock may be held by the very code that it interrupts."""
    due_at = 0.0
    while not heard and not (alive and readable([alive], 0)):
        if time.monotonic() > due_at:
            return_memory()
            due_at = time.monotonic() + RETURN_MEMORY_S
        time.sleep(0.2)


# Workers: processes that serve one port

class AsWorker(NamedTuple):
    """What a worker is told by its parent, as JSON on its command line (`--as-worker`, for nobody
    else).  Both descriptors are inherited."""
    number: int             # from 1; the first asks for quotas and lists of models for all
    listener: int           # the listening socket's descriptor
    alive: int              # of a pipe that nobody writes to: it ends when the parent is gone
    simulator: str          # its URL, with --demo
    folder: str             # where simulated accounts' state is shared, "" for real ones


@dataclass
class Worker:
    """One place in the crew, and who has it now.  Times are monotonic."""
    number: int
    process: subprocess.Popen | None = None
    began_at: float = 0.0
    pause_s: float = 0.0        # before the next one
    due_at: float = 0.0         # when that begins


class Crew:
    """The worker processes of one listening socket, each begun again when it ends, after a pause
    that grows while none lives long.  Each is a fresh start of this file: a fork would copy locks
    that other threads hold.  Only its thread touches the processes, until `stop` has joined it."""

    def __init__(self, services: Services, listener: Any, given: list[str], folder: str,
                 workers: list):
        self.services, self.listener, self.given, self.folder = services, listener, given, folder
        self.server_port = listener.getsockname()[1]
        self.workers = workers          # to be filled; seen by who ends them at once
        self._alive, self._kept_open = os.pipe()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="crew", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """From now on nobody can connect; returns when every worker has drained."""
        self._ending.set()
        self._thread.join()
        self.listener.close()
        processes = [w.process for w in self.workers if w.process is not None]
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
        os.close(self._alive)
        os.close(self._kept_open)

    def _run(self) -> None:
        # Ctrl-C goes to the whole group of the terminal; workers inherit that they do not hear it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        self.workers += map(Worker, range(1, self.services.workers + 1))
        while not self._ending.is_set():
            for worker in self.workers:
                self._tend(worker, time.monotonic())
            self._ending.wait(0.1)

    def _tend(self, worker: Worker, now: float) -> None:
        if worker.process is None and now >= worker.due_at:
            self._start(worker, now)
        elif worker.process is not None and worker.process.poll() is not None:
            is_early = now - worker.began_at < WORKER_LASTS_S
            worker.pause_s = min(30.0, worker.pause_s * 2 or 1.0) if is_early else 1.0
            worker.due_at = now + worker.pause_s
            code, pid, worker.process = worker.process.returncode, worker.process.pid, None
            self.services.log.line(
                "worker %s (pid %s) ended by %s; another begins in %s", worker.number, pid,
                f"signal {-code}" if code < 0 else f"exit code {code}", human_s(worker.pause_s))

    def _start(self, worker: Worker, now: float) -> None:
        told = AsWorker(worker.number, self.listener.fileno(), self._alive, self.services.simulator,
                        self.folder)
        try:
            worker.process = subprocess.Popen(
                [sys.executable, program_file(), *self.given,
                 "--as-worker", json_encode(told)], pass_fds=(told.listener, told.alive))
        except OSError as err:      # no memory, too many processes
            worker.due_at = now + 30
            self.services.log.line("worker %s cannot begin: %s", worker.number, err)
            return
        if worker.began_at:
            self.services.log.line("worker %s begins again (pid %s)", worker.number,
                                   worker.process.pid)
        worker.began_at = now


@contextlib.contextmanager
def running_crew(args: argparse.Namespace, log_out: Any, workers: list) -> Iterator[Crew]:
    """Workers that serve one port; drained on the way out.  This process only looks after them."""
    import tempfile
    flags = {name: getattr(args, name, None) for name in SETTINGS}
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="agproxy-")) if args.demo else ""
        services = stack.enter_context(services_for(args, Log(log_out), flags, recovers=True))
        services.state.on_foreign_change = lambda: None     # nobody asks this process's pool
        config = services.config
        check_bind(config)
        with bind_errors(config):
            listener = shared_listener(config.host, config.port)
        crew = Crew(services, listener, args.given, folder, workers)
        stack.callback(crew.stop)
        yield crew


def serve_as_worker(args: argparse.Namespace, log_out: Any) -> int:
    """A worker's life: until its parent says so, or is gone."""
    heard: list[int] = []
    # several may send it, to this process and to its parent, which sends it on: it means one thing
    signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    os.set_inheritable(args.as_worker.alive, False)
    with open(args.as_worker.alive, "rb", buffering=0) as alive, running_proxy(args, log_out):
        live_until(heard, alive)
    return 0


def offline(args: argparse.Namespace) -> contextlib.AbstractContextManager[Services]:
    """The pool for a command, without a server."""
    return services_for(args, Log(sys.stderr), {})


def client_variables(client: str, url: str, key: str) -> dict[str, str]:
    """What a client is started with; claude takes the key as a token only."""
    key = key or "agproxy"
    row = {"ANTHROPIC_BASE_URL": url, "ANTHROPIC_AUTH_TOKEN": key, "OPENAI_BASE_URL": url + "/v1",
           "OPENAI_API_KEY": key, "AGPROXY_KEY": key, "GOOGLE_GEMINI_BASE_URL": url,
           "GEMINI_API_KEY": key}
    if os.path.basename(client) == "gemini":
        # beside GEMINI_API_KEY it takes an address only where its settings name that key
        row.update(GOOGLE_GENAI_USE_VERTEXAI="true", GOOGLE_API_KEY=key, GOOGLE_VERTEX_BASE_URL=url)
    return row if os.path.basename(client) == "claude" else {**row, "ANTHROPIC_API_KEY": key}


def client_options(client: str, url: str) -> list[str]:
    """What must stand on the command line of a client that reads no variables."""
    if os.path.basename(client) != "codex":
        return []
    provider = (f'{{name="agproxy",base_url="{url}/v1",env_key="AGPROXY_KEY",'
                'wire_api="responses"}')
    return ["-c", "model_providers.agproxy=" + provider, "-c", 'model_provider="agproxy"']


def server_url(server: ProxyServer | Crew) -> str:
    host = server.services.config.host
    host = "127.0.0.1" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    scheme = "https" if server.services.config.tls_cert else "http"
    return f"{scheme}://{host}:{server.server_port}"


def lacks_account(args: argparse.Namespace) -> bool:
    """Whether no account can serve; what to do about it is said."""
    if args.demo:
        return False
    path = config_path(args.accounts, os.environ)
    accounts = load_config(path, {}, os.environ, recovers=True).accounts
    if any(row.get("enabled", True) for row in accounts):
        return False
    say(f"All {len(accounts)} accounts are disabled; python3 agproxy.py accounts enable NAME"
        if accounts else
        f"No account in {path}. Add one:\n"
        "    python3 agproxy.py accounts add --provider gemini      an API key\n"
        "    python3 agproxy.py accounts add                        a Google sign-in\n"
        "or have a key in the environment, as GEMINI_API_KEY or OPENAI_API_KEY,\n"
        "or try everything without an account: python3 agproxy.py serve --demo")
    return True


def raise_descriptor_limit() -> int:
    """Each stream holds two descriptors; the usual soft limit of 1,024 is too low.  Returns how
    many this process may hold now."""
    try:
        import resource
    except ImportError:
        return 512          # Windows has no such limit, but `select` takes no more
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 8192 if hard == resource.RLIM_INFINITY else min(8192, hard)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return max(soft, wanted) if soft != resource.RLIM_INFINITY else wanted


def say_banner(server: ProxyServer | Crew, is_demo: bool) -> None:
    services = server.services
    config, url = services.config, server_url(server)
    mode = "  (demo: simulated accounts)" if is_demo else ""
    others = " and the machine's other addresses" if config.host in ("0.0.0.0", "::") else ""
    say(f"agproxy {VERSION} listens on {url}{others}{mode}")
    if services.workers > 1:
        say(f"workers   {services.workers} processes")
    say("key       " + ("PROXY_API_KEY" if config.api_key else "a user's" if config.users else
                        "none needed on this machine"))
    say("accounts  " + ", ".join(f"{a.label} ({a.provider.id}, {state})"
                                 for a, state in services.pool.states()))
    policies = {a.provider.policy for a in services.pool.accounts} - {""}
    say(*(f"terms     {policy}" for policy in sorted(policies)))
    key = "$PROXY_API_KEY" if config.api_key else "agproxy"
    say(f"connect   ANTHROPIC_BASE_URL={url} ANTHROPIC_AUTH_TOKEN={key} claude",
        f"          OPENAI_BASE_URL={url}/v1 OPENAI_API_KEY={key}",
        f"          GOOGLE_GEMINI_BASE_URL={url} GEMINI_API_KEY={key}")
    if services.simulator:
        say(f"simulator {services.simulator}  "
            """(POST /sim/faults {"account": "demo-2", "faults": ["503"]} makes a call fail)""")


def log_stream(args: argparse.Namespace) -> Any:
    """Where the log goes; where several processes write to it, they do so line by line."""
    out = open(args.log_file, "a", encoding="utf-8") if args.log_file else sys.stdout
    if args.workers > 1:
        out.reconfigure(line_buffering=True)
    return out


def command_serve(args: argparse.Namespace) -> int:
    if args.workers > 1 and os.name == "nt":
        raise ConfigError("--workers: on Windows one process serves; leave it out")
    if args.as_worker:
        return serve_as_worker(args, log_stream(args))
    if lacks_account(args):
        return 4
    raise_descriptor_limit()
    heard: list[int] = []
    workers: list[Worker] = []

    def stop(number: int, frame: Any) -> None:
        if heard:                   # the second signal ends at once
            for process in [w.process for w in workers]:
                if process is not None:
                    process.kill()
            os._exit(130)
        heard.append(number)

    for name in ("SIGINT", "SIGTERM", "SIGBREAK"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), stop)
    out = log_stream(args)
    with (running_crew(args, out, workers) if args.workers > 1
          else running_proxy(args, out)) as server:
        say_banner(server, args.demo)
        live_until(heard)
        say("stopping: running answers are finished first, a second signal ends at once")
    return 0


def command_run(args: argparse.Namespace) -> int:
    """The client's own exit code; the proxy lives exactly as long as the client."""
    import shutil
    if lacks_account(args):
        return 4
    client = shutil.which(args.client)
    if not client:
        raise ConfigError(f"{args.client} is not installed or not on PATH")
    args.port = 0 if args.port is None else args.port
    with open(args.log_file or os.devnull, "a", encoding="utf-8") as out:
        with running_proxy(args, out) as server:
            config = server.services.config
            if config.users and not config.api_key:     # the client is none of them
                import secrets
                os.environ["PROXY_API_KEY"] = secrets.token_urlsafe(24)     # of a later edit, too
                vars(config)["api_key"] = os.environ["PROXY_API_KEY"]
            key = config.api_key
            url = server_url(server)
            environment = {**os.environ, **client_variables(args.client, url, key)}
            options = client_options(args.client, url)
            signal.signal(signal.SIGINT, signal.SIG_IGN)    # Ctrl-C belongs to the client
            child = subprocess.Popen([client, *options, *args.arguments], env=environment)
            signal.signal(signal.SIGTERM, lambda number, frame: child.terminate())
            code = child.wait()
            vars(server.services.config)["drain_s"] = 1.0       # nobody is left to wait for
    return code if code >= 0 else 128 - code


def command_models(args: argparse.Namespace) -> int:
    """Every model with the accounts that serve it."""
    with offline(args) as found:
        pool = found.pool
    if not any(account.enabled for account in pool.accounts):
        lacks_account(args)
        return 4
    for model, candidates in pool.offers():
        labels = dict.fromkeys(c.account.label for c in candidates)
        say(f"{model.id:28} {model.label:26} {model.context_tokens:>9,}  {', '.join(labels)}")
    for account in pool.accounts:
        if "*" in account.provider.names and not account.models:
            say(f"{'any name':28} {'as it is asked for':26} {'':>9}  {account.label}")
    return 0


# Accounts

def agree(provider: Provider) -> None:
    """The typed yes without which nothing is added that the vendor's terms forbid."""
    if not provider.policy:
        return
    say(f"{provider.id}: {provider.policy}")
    if ask_person("Type yes to go on: ").lower() != "yes":
        raise ConfigError("nothing was added")


def read_secret(option: str | None, prompt: str) -> str:
    """A secret from standard input (`-`), or asked for without echo; never from the command
    line, which other users of the machine can read."""
    if option not in (None, "-"):
        raise ConfigError("secrets are not taken from the command line; write `-` and give it on "
                          "standard input")
    if option is None and sys.stdin.isatty():
        import getpass
        secret = getpass.getpass(prompt).strip()
    else:
        secret = ask_person("")
    if not secret:
        raise ConfigError("no secret was given")
    remember_secret(secret)
    return secret


def browser_login(args: argparse.Namespace, provider: Provider,
                  connections: ConnectionCache) -> tuple[dict, dict]:
    """(token answer, client cells to store) of a sign-in by browser, by paste, or both at once."""
    clients = oauth_clients(provider, os.environ) if provider.scopes else [("", "")]
    is_found = not clients
    clients = clients or discover_clients(provider, os.environ)
    if not clients:
        raise no_client(provider)
    login = Login(provider, clients, os.environ)
    hint = browser_hint(os.environ)
    say(f"Open this link and sign in:\n\n{login.url}\n")
    if hint or args.no_browser:
        say(hint.replace("{port}", str(login.port)) or "If its last page does not load, paste its "
            "address here.")
    else:
        import webbrowser
        threading.Thread(target=webbrowser.open, args=(login.url,), daemon=True).start()
        say("The browser comes back here by itself; or paste the address of its last page.")

    def read_pasted() -> None:
        for line in sys.stdin:
            wrong = login.take(line) if line.strip() else ""
            if wrong:
                say(f"{wrong}; paste the whole address of the last page")

    threading.Thread(target=read_pasted, name="paste", daemon=True).start()
    deadline = time.monotonic() + LOGIN_WAIT_S
    try:
        answer: dict = {}
        while not answer:
            code = login.wait(max(0.1, deadline - time.monotonic()))
            try:
                answer = login.exchange(code, connections)
            except ProxyError as err:
                if "that code" not in err.message:
                    raise
                say(f"{err.message}; the sign-in still waits for the right one")
    finally:
        login.close()
    client_id, secret = login.clients[0]
    return answer, {"client_id": client_id, "client_secret": secret} if is_found else {}


def check_credential(row: dict, providers: Mapping[str, Provider],
                     connections: ConnectionCache) -> None:
    """Raises ProxyError when the credential does not work.  A rotated refresh token and the e-mail
    address are put into `row`."""
    account = account_from_row({"name": "new", **row}, providers)
    if account.provider.auth != "oauth":
        check_key(account, connections)
        return

    def rotated(_: Account, old: str, new: str) -> None:
        row["refresh_token"] = new
    token = Tokens(connections, Clock(), small_call_error, on_rotate=rotated).access(account)
    if not row.get("email"):
        row["email"] = oauth_email(account.provider, {"access_token": token}, connections)


def chosen_accounts(found: Services, name: str | None) -> list[Account]:
    """The account of that name, or all; raises ConfigError with the names there are."""
    chosen = [a for a in found.pool.accounts if name in (None, a.name)] or [
        a for a in found.pool.accounts if name == a.label]
    if not found.pool.accounts:
        raise ConfigError("there is no account yet; `accounts add` adds one")
    if not chosen:
        names = ", ".join(a.label for a in found.pool.accounts)
        raise ConfigError(f"no account {name}; there are: {names}")
    return chosen


def show_readings(args: argparse.Namespace, name: str | None, max_age_s: float = 0) -> int:
    """Reads facts and quota of the account of that name, or all, where they are older; prints them.
    The exit code says whether any can serve."""
    with offline(args) as found:
        chosen = chosen_accounts(found, name)
        labels, now = {a.label for a in chosen}, found.clock.now()
        read_at = {(row["name"], q["pool"]): q["read_at"] for row in found.pool.report()
                   for q in row["quotas"]}
        for account in chosen:
            if account.provider.quota and not found.pool.is_stopped(account):
                found.keeper.read_key(account)
            for provider in account.providers if account.provider.envelope else ():
                is_old = now - read_at.get((account.label, provider.id), 0) > max_age_s or (
                    max_age_s < 1e9 and found.pool.has_stated_limit((account.name, provider.id)))
                if is_old and not found.pool.is_stopped(account):
                    found.keeper.read(account, provider)
        report, now = [r for r in found.pool.report() if r["name"] in labels], found.clock.now()
    if args.json:
        say(json.dumps({"accounts": report}, indent=2).replace("Infinity", "null"))
    else:
        is_ascii = "utf" not in (getattr(sys.stdout, "encoding", "") or "").lower()
        say(*status_lines(report, now, is_ascii, args.models))
    return 0 if any(row["state"] in ("ready", "soft-limited", "resting") for row in report) else 5


def account_add(args: argparse.Namespace) -> int:
    """Signs in, checks what the account can do, and only then stores it."""
    path = config_path(args.accounts, os.environ)
    config = load_config(path, {}, os.environ)
    provider = config.providers.get(args.provider)
    if provider is None or not provider.base_urls:
        known = ", ".join(p for p, r in config.providers.items() if r.base_urls)
        raise ConfigError(f"--provider: one of {known} is required, not {args.provider}")
    connections, cells = ConnectionCache(Clock(), os.environ, lambda: config.settings), {}
    row = {"name": args.name, "provider": provider.id, "project": args.project}
    is_key = provider.auth != "oauth"
    if args.refresh_token if is_key else args.key:
        wanted = "a key: --key -" if is_key else "a sign-in, or --refresh-token -"
        raise ConfigError(f"{provider.id} takes {wanted}")
    if is_key and provider.auth_url and not args.key and sys.stdin.isatty():
        agree(provider)
        row["api_key"] = browser_login(args, provider, connections)[0]["key"]
    elif is_key:
        is_keyless = provider.id in KEYLESS and not args.key
        row["api_key"] = "" if is_keyless else read_secret(args.key, f"API key for {provider.id}: ")
        agree(provider)
    elif args.refresh_token:
        row["refresh_token"], _, told = read_secret(args.refresh_token, "").partition("|")
        row["project"] = row["project"] or told.partition("|")[0]
        agree(provider)
    else:
        agree(provider)
        answer, cells = browser_login(args, provider, connections)
        row["refresh_token"], row["email"] = answer["refresh_token"], oauth_email(
            provider, answer, connections)
    row = {k: v for k, v in row.items() if v}
    check_credential(row, {**config.providers, provider.id: provider._replace(**cells)},
                     connections)
    name, is_new = store_account(path, row, cells)
    say(f"{'added' if is_new else 'signed in again'}: {name}")
    code = show_readings(args, name)
    say("A running server takes it up by itself.  Next: python3 agproxy.py accounts list")
    return code


def account_list(args: argparse.Namespace) -> int:
    path = "" if args.demo else config_path(args.accounts, os.environ)
    if path and not load_config(path, {}, os.environ).accounts:
        lacks_account(args)
        return 4
    show_readings(args, None, 0 if args.demo else 1e9)
    return 0


def verify_account(account: Account, found: Services) -> str:
    """`works`, and what does not; raises ProxyError or ConfigError when nothing does."""
    if account.provider.auth != "oauth":
        check_key(account, found.tokens.connections)
        return "works"
    token, absent = found.tokens.access(account, is_shared=False), []
    for provider in account.providers if account.provider.envelope else ():
        facts = pool_facts(found.pool, found.tokens, account, provider, token, again=True)
        absent += [f"{provider.id} is absent: {facts.absent}"] * bool(facts.absent)
        failure = None if facts.absent else found.keeper.read(account, provider)
        if failure is not None:
            raise failure
    if len(absent) == len(account.providers):
        raise ProxyError("absent", "; ".join(absent))
    return "; ".join(["works", *absent])


def account_verify(args: argparse.Namespace) -> int:
    """Asks upstream for each account again; one that works is cleared of its stop."""
    failed = 0
    with offline(args) as found:
        for account in chosen_accounts(found, args.name):
            try:
                said = verify_account(account, found)
                found.pool.clear(account, stops_only=True)
                state = dict(found.pool.states())[account]
                said += f"; {state}" if state != "ready" else ""
            except (ProxyError, ConfigError) as err:
                failed += 1
                said = redact(str(err))
            say(f"{account.label}: {said}")
    return 4 if failed else 0


def account_clear(args: argparse.Namespace) -> int:
    with offline(args) as found:
        for account in chosen_accounts(found, args.name):
            ended = found.pool.clear(account)
            say(f"{account.label}: {ended} limits, stops and absences cleared")
    return 0


def edit_account(args: argparse.Namespace, change: Callable[[list, dict], Any]) -> str:
    """`change(rows, row)` on the account of that name in the file; its name."""
    def find(stored: dict) -> str:
        rows = stored_accounts(stored)
        fit = [r for r in rows if r[0] == args.name] or [
            r for r in rows if r[0].partition("@")[0] == args.name]
        if len(fit) != 1:
            raise ConfigError(f"{'several accounts are' if fit else 'no account'} {args.name}; "
                              f"there are: {', '.join(name for name, _ in rows) or 'none'}")
        change(stored["accounts"], fit[0][1])
        return fit[0][0]
    return edit_accounts(config_path(args.accounts, os.environ), find)


def account_remove(args: argparse.Namespace) -> int:
    with offline(args) as found:
        name = edit_account(args, lambda rows, row: rows.remove(row))
        for account in chosen_accounts(found, name):    # as it was when this began
            found.pool.clear(account)
        for ending in ("", ".lock"):
            with contextlib.suppress(OSError):      # it had none
                os.unlink(found.tokens.kept_path(name) + ending)
        for table in ("facts", "quotas", "used"):
            found.state.delete(table, name)
    say(f"removed: {name}.  Its sign-in is still valid at the vendor; revoke it there.")
    return 0


def account_enable(args: argparse.Namespace) -> int:
    is_on = args.action == "enable"
    name = edit_account(args, lambda rows, row: row.update(enabled=is_on))
    if is_on:
        with offline(args) as found:
            for account in chosen_accounts(found, name):
                found.pool.clear(account, stops_only=True)
    say(f"{args.action}d: {name}")
    return 0


def _importable(name: str) -> bool:
    try:
        return bool(import_accounts(name, os.environ)[0])
    except (ConfigError, OSError):
        return False


def account_import(args: argparse.Namespace) -> int:
    """Accounts of another program; its store is only read."""
    if not args.source:
        known = [name for name in IMPORT_SOURCES if _importable(name)]
        say("found here: " + (", ".join(known) or "nothing") + "; run `accounts import SOURCE` "
            f"with one of {', '.join(IMPORT_SOURCES)}, a file or a folder")
        return 0
    path = config_path(args.accounts, os.environ)
    config = load_config(path, {}, os.environ)
    rows, left_out = import_accounts(args.source, os.environ)
    new, known = sort_imports(rows, config)
    for provider in dict.fromkeys(row["provider"] for row in new):
        try:
            agree(config.providers[provider])
        except ConfigError:
            say(f"without a yes, nothing of {provider} is taken over")
            new = [row for row in new if row["provider"] != provider]
    for row in new:
        cells = row.pop("client", None) or known_client(config.providers[row["provider"]],
                                                        os.environ)
        name, _ = store_account(path, row, cells)
        say(f"added: {name} ({row['provider']})")
    left_out += len(rows) - len(new) - known
    if left_out:
        say(f"{left_out} left out: not of a provider here, or without a refresh token")
    say(f"{len(new)} added, {known} were here already.  Next: python3 agproxy.py accounts verify")
    return 0


def account_export(args: argparse.Namespace) -> int:
    """The accounts with their secrets, to a file of mode 0600 or to standard output."""
    config = load_config(config_path(args.accounts, os.environ), {}, os.environ)
    text = json.dumps({"accounts": list(config.accounts)}, indent=2, ensure_ascii=False) + "\n"
    if args.file == "-":
        sys.stdout.write(text)
    else:
        write_atomic(args.file, text.encode("utf-8"))
        say(f"{len(config.accounts)} accounts with their secrets are in {args.file}")
    return 0


ACCOUNT_ACTIONS = {         # name -> (function, help, positional argument and whether it must be)
    "add": (account_add, "sign in, or store a key", "", ""),
    "list": (account_list, "tier, state, quota and limits of each", "", ""),
    "verify": (account_verify, "ask upstream whether it works; ends a stop that no longer holds",
               "name", "?"),
    "remove": (account_remove, "forget an account", "name", None),
    "enable": (account_enable, "let it serve again", "name", None),
    "disable": (account_enable, "leave it out", "name", None),
    "clear": (account_clear, "forget its limits and stops", "name", "?"),
    "import": (account_import, "take over accounts of another program", "source", "?"),
    "export": (account_export, "write accounts with their secrets to a file", "file", None),
}


def command_accounts(args: argparse.Namespace) -> int:
    return ACCOUNT_ACTIONS[args.action or "list"][0](args)


def command_quota(args: argparse.Namespace) -> int:
    """What is left, read now where nobody read it lately; 5 when nothing is."""
    if lacks_account(args):
        return 4
    while True:
        code = show_readings(args, None, 60)
        if not args.watch:
            return code
        time.sleep(60)
        say("")


def command_why(args: argparse.Namespace) -> int:
    """Why a request went where it went: each selection with its score sheet."""
    with offline(args) as found:
        wanted = ("1 ORDER BY at DESC LIMIT 1",) if args.id == "last" else ("id = ?", args.id)
        rows = found.state.rows("requests", *wanted)
    if not rows and args.demo:
        warn("the demo forgets its requests when it ends, and tells them to nobody else; its log "
             "says what happened")
        return 1
    if not rows:
        warn("no request yet" if args.id == "last" else f"no request {args.id}; its id is in the "
             "answer's request-id header, and it is remembered for 30 days")
        return 1
    row = json_decode(rows[0][2].encode())
    if args.json:
        say(json.dumps(row, indent=2))
        return 0
    say(f"{row['id']}  {row['client']}  {row['asked']} -> {row['used']}  by {row['account']}  "
        f"status {row['status']}  {row['total_ms']} ms  {row['note']}".rstrip())
    for choice in row["choices"]:
        say(f"  {time.strftime('%H:%M:%S', time.localtime(choice['at']))}  "
            f"{choice['reason'] or 'nobody could be chosen'}", *sheet_lines(choice["sheet"]))
    say(*(f"  failed  {failure}" for failure in row["failures"]))
    say(*(f"  mended  after a refusal: {repair}" for repair in row.get("refused", ())))
    say(*(f"  mended  {what}{f' ({count} times)' if count > 1 else ''}"
          for what, count in row.get("mended", {}).items()))
    return 0


def command_explain(args: argparse.Namespace) -> int:
    """What would happen to a request for this model now: a dry run, nothing is sent."""
    if lacks_account(args):
        return 4
    with offline(args) as found:
        plain = Request(args.model, (), wanted=model_variant(args.model)[0])
        name, why = route_for(plain, {}, found.config, lambda: 0)
        with contextlib.suppress(ProxyError):       # what nobody serves stays, as in serving
            name = name if name and found.candidates(name) else ""
        models, candidates, _ = found.plan(name or args.model)
        chosen, reason, sheet = found.pool.explain(candidates)
        now = found.clock.now()
    told = ", else ".join(f"{model.id} ({model.label})" for model in models)
    say(f"{args.model} -> " + (f"{name} ({why}) -> " if name else "") + told,
        *sheet_lines(sheet_rows(sheet, now)))
    if chosen is None:
        say(refusal(args.model, sheet, now, None).message)
        return 5 if sheet else 4
    say(f"would use {chosen.candidate.account.label} ({chosen.candidate.provider.id}): {reason}")
    return 0


# Routing

def routing_lines(config: Config) -> list[str]:
    """Aliases, groups, roles and rules as they are in force."""
    lines = [f"alias  {name} -> {', '.join(to)}" for name, to in sorted(config.aliases.items())]
    for name, group in sorted(config.groups.items()):
        lines.append(f"group  {name} ({group.strategy})")
        for number, item in enumerate(group.items, 1):
            cells = {c: v for c, v in item._asdict().items() if c != "model" and v not in ("", 1.0)}
            lines.append(f"    {number}. {item.model}"
                         + "".join(f"  {cell}={value}" for cell, value in cells.items()))
    for role, (to, over) in config.routes.items():
        lines.append(f"route  {role}{f' over {over} tokens' if role == 'long_context' else ''}"
                     f" -> {to}")
    for number, rule in enumerate(config.rules, 1):
        told = {c: v for c, v in rule._asdict().items() if v and c != "when"}
        lines.append(f"rule   {number}. when {json_encode(rule.when)}: {json_encode(told)}")
    return lines


def show_routing(args: argparse.Namespace) -> int:
    lines = routing_lines(load_config(config_path(args.accounts, os.environ), {}, os.environ))
    say(*lines or ["Nothing is routed: each model is served by the accounts that have it.",
                   "Begin with: python3 agproxy.py alias NAME MODEL"])
    return 0


def edit_routing(args: argparse.Namespace, change: Callable[[dict], Any]) -> int:
    """Changes the accounts file, which is validated whole, and says what it is now."""
    edit_accounts(config_path(args.accounts, os.environ), change)
    return show_routing(args)


def command_routes(args: argparse.Namespace) -> int:
    """What is routed where; with a role and a name, sets that role."""
    if not args.role:
        return show_routing(args)
    if args.role not in ROUTE_ROLES:
        raise ConfigError(f"a role is one of {', '.join(ROUTE_ROLES)}, not {args.role}")

    def change(stored: dict) -> None:
        routes = stored.setdefault("routes", {})
        if args.to is None and args.role not in routes:
            raise ConfigError(f"nothing is routed by {args.role}")
        if args.to is None:
            del routes[args.role]
        else:
            routes[args.role] = {"over_tokens": args.over, "to": args.to} if args.over else args.to
    return edit_routing(args, change)


def command_alias(args: argparse.Namespace) -> int:
    """Lists aliases; sets one; without targets removes it."""
    if args.name is None:
        return show_routing(args)

    def change(stored: dict) -> None:
        aliases = stored.setdefault("aliases", {})
        if not args.models and args.name not in aliases:
            raise ConfigError(f"there is no alias {args.name}")
        aliases.pop(args.name, None)
        if args.models:
            aliases[args.name] = args.models[0] if len(args.models) == 1 else args.models
    return edit_routing(args, change)


def group_of(stored: dict, name: str) -> list:
    """The members of a stored group; raises ConfigError where there is none."""
    group = object_of(stored.get("groups")).get(name)
    if group is None:
        names = ", ".join(object_of(stored.get("groups"))) or "none"
        raise ConfigError(f"there is no group {name}; there are: {names}")
    return group["models"]


def member_at(models: list, text: str) -> int:
    """The place of a member given by its number or name; raises ConfigError."""
    names = [m if isinstance(m, str) else str(m.get("model")) for m in models]
    if text.isdecimal() and 1 <= int(text) <= len(models):
        return int(text) - 1
    if text not in names:
        raise ConfigError(f"{text} is not in the group; there are: {', '.join(names)}")
    return names.index(text)


def group_create(stored: dict, args: argparse.Namespace) -> None:
    if args.name in stored.setdefault("groups", {}):
        raise ConfigError(f"there is a group {args.name} already")
    stored["groups"][args.name] = {"strategy": args.strategy, "models": args.models}


def group_move(stored: dict, args: argparse.Namespace) -> None:
    models = group_of(stored, args.name)
    if len(args.models) != 2 or not re.fullmatch(r"[1-9][0-9]{0,3}", args.models[1]):
        raise ConfigError("groups move NAME MEMBER POSITION")
    member = models.pop(member_at(models, args.models[0]))
    models.insert(int(args.models[1]) - 1, member)


def group_remove(stored: dict, args: argparse.Namespace) -> None:
    models = group_of(stored, args.name)
    places = {member_at(models, text) for text in args.models}     # as numbered before
    models[:] = [m for place, m in enumerate(models) if place not in places]
    if not models:
        raise ConfigError(f"the group would be empty; groups delete {args.name} removes it")


def group_delete(stored: dict, args: argparse.Namespace) -> None:
    group_of(stored, args.name)
    del stored["groups"][args.name]


GROUP_ACTIONS = {       # name -> (change of the stored object, help, whether it takes models)
    "create": (group_create, "a new group of MODELs, in their order", True),
    "add": (lambda stored, args: group_of(stored, args.name).extend(args.models),
            "MODELs behind those there are", True),
    "move": (group_move, "MEMBER (number or name) to POSITION", True),
    "remove": (group_remove, "MEMBERs out of it", True),
    "delete": (group_delete, "the whole group", False),
    "test": (None, "which account would serve it now", False),
    "list": (None, "all groups, aliases, routes and rules", False),
}


def command_groups(args: argparse.Namespace) -> int:
    if args.action == "test":
        args.model = args.name
        return command_explain(args)
    if args.action in (None, "list"):
        return show_routing(args)
    return edit_routing(args, lambda stored: GROUP_ACTIONS[args.action][0](stored, args))


# Bench: agproxy as a client meets it, beside a direct connection and another proxy

class BenchLoad(NamedTuple):
    """One thing that is measured.  `unit` is what CPU is told by: request, stream or event."""
    key: str
    title: str
    size_bytes: int
    turns: int
    events: int
    clients: int
    unit: str
    figures: tuple      # keys of BENCH_FIGURES that the table shows; JSON has all
    pace: float = 0.0   # events a second of each stream; 0: at once
    is_new: bool = False        # each request begins another conversation


class BenchScale(NamedTuple):
    runs: int
    warm_s: float
    seconds: float      # of each load
    live_events: int
    ramp_s: float       # for 1,000 live streams
    requests: int       # after which memory is read, and after twice and four times as many


_LOOPS = ("cpu", "rate", "p50", "p99")
_LIVE = ("cpu", "delay50", "delay99", "memory", "threads", "failures")
BENCH_LOADS = (
    BenchLoad("small_1", "small request, 1 client", 1000, 0, 20, 1, "request", _LOOPS),
    BenchLoad("small_16", "small request, 16 clients", 1000, 0, 20, 16, "request", _LOOPS),
    BenchLoad("large", "130 KB request: 30 tools, 40 turns, 4 clients", BENCH_LARGE_BYTES, 40, 20,
              4, "request", _LOOPS),
    BenchLoad("large_new", "130 KB request, each of a new conversation, 4 clients",
              BENCH_LARGE_BYTES, 40, 20, 4, "request", _LOOPS, is_new=True),
    BenchLoad("huge", "1 MB request, 4 clients", 1_000_000, 40, 20, 4, "request", _LOOPS),
    BenchLoad("first", "stream of 20 events, 1 client", 1000, 0, 20, 1, "stream",
              ("first", "p50")),
    BenchLoad("stream_20", "stream of 20 events, 16 clients", 1000, 0, 20, 16, "stream",
              _LOOPS),
    BenchLoad("saturated", "streams of 2,000 events, 16 clients", 1000, 0, 2000, 16, "event",
              ("cpu", "rate")),
    BenchLoad("live_200", "live streams of 20 events/s", 1000, 0, 0, 200, "event", _LIVE, 20.0),
    BenchLoad("live_1000", "live streams of 20 events/s", 1000, 0, 0, 1000, "event", _LIVE, 20.0),
)
BENCH_SCALES = {"full": BenchScale(3, 0.3, 0.8, 100, 2.0, 4000),
                "quick": BenchScale(1, 0.1, 0.25, 40, 1.5, 2000)}
BENCH_FIGURES = {       # key -> (label, unit)
    "cold": ("cold start to the first answer", "ms"), "idle": ("memory when idle", "MB"),
    "cpu": ("CPU", "us a {unit}"), "rate": ("rate", "{unit}s/s"), "p50": ("p50", "ms"),
    "p99": ("p99", "ms"), "first": ("first event, p50", "ms"),
    "delay50": ("event delay, p50", "ms"), "delay99": ("event delay, p99", "ms"),
    "memory": ("memory", "MB"), "threads": ("threads", ""), "failures": ("failures", "")}
BENCH_START = BenchLoad("start", "start", 1000, 0, 20, 1, "request", ("cold", "idle"))
BENCH_GROWTH = (        # (title, unit, what holds, loads); a cost is told by event or kilobyte
    ("streamed event, in a stream of", "events", "cost of an event does not depend on the length", [
        BenchLoad(str(n), f"{n:,}", 1000, 0, n, 1, "event", ()) for n in (200, 2000, 20000)]),
    ("kilobyte of a first request of", "KB", "cost of a request is linear in its bytes", [
        BenchLoad(str(kb), f"{kb:,}", kb * 1000, kb // 3, 20, 2, "request", (), is_new=True)
        for kb in (512, 1024, 2048)]))      # in smaller ones known tools weigh too much
BENCH_SLACK = 1.3       # noise of a shared machine: what costs more than that is told as growth
BENCH_MEMORY_SLACK = 0.25           # KB a finished request: pages come and go; one kept has 1 KB
_BENCH_ENVIRONMENT = ("PATH", "SYSTEMROOT", "TEMP", "TMP", "TMPDIR", "LANG", "LC_ALL",
                      "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHON_GIL", "PYTHONHOME",
                      "PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX")


class ProcessUsage(NamedTuple):
    """What a process and its children used, as the operating system counts it."""
    cpu_s: float
    memory_mb: float
    threads: int


def _processes() -> Iterator[tuple[int, int, ProcessUsage]]:
    """(id, parent, usage) of each process; nothing on Windows."""
    if os.path.isdir("/proc/self/task"):        # Linux
        tick, page = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as handle:
                cells = handle.read().rpartition(b")")[2].split()
                yield int(name), int(cells[1]), ProcessUsage(      # with children that have ended
                    sum(map(int, cells[11:15])) / tick, int(cells[21]) * page / 1e6, int(cells[17]))
    elif os.name == "posix":
        rows = subprocess.run(["ps", "-axo", "pid=,ppid=,rss=,time="], capture_output=True)
        for row in rows.stdout.decode("ascii", "replace").splitlines():
            pid, parent, memory, spent = row.split()[:4]
            days, _, clock = spent.rpartition("-")
            seconds = functools.reduce(lambda s, part: s * 60 + float(part), clock.split(":"), 0.0)
            yield int(pid), int(parent), ProcessUsage(
                seconds + 86400 * int(days or 0), int(memory) * 1024 / 1e6, 0)


def process_usage(pid: int | None) -> ProcessUsage | None:
    """Sums over the process and its children; None where it is not known."""
    rows = {row[0]: row for row in _processes()} if pid else {}
    tree = {pid}
    for _ in range(4):          # generations
        tree |= {row[0] for row in rows.values() if row[1] in tree}
    found = [rows[p][2] for p in tree if p in rows]
    return ProcessUsage(*map(sum, zip(*found))) if found else None


def percentile(values: Iterable[float], share: float) -> float | None:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else None


def median(values: Iterable[float | None]) -> float | None:
    """Of those that are known."""
    known = sorted(v for v in values if v is not None)
    half = len(known) // 2
    return (known[half] + known[~half]) / 2 if known else None


def bench_figures(load: BenchLoad, tally: BenchTally) -> dict[str, float | None]:
    """The figures of a load that the load client sees; times in milliseconds."""
    figures = {"p50": percentile(tally.times_s, 0.5), "p99": percentile(tally.times_s, 0.99),
               "first": percentile(tally.firsts_s, 0.5),
               "delay50": percentile(tally.delays_s, 0.5),
               "delay99": percentile(tally.delays_s, 0.99)}
    units = tally.answers * (load.events if load.unit == "event" else 1)
    return {**{key: None if s is None else s * 1e3 for key, s in figures.items()},
            "rate": units / tally.elapsed_s, "failures": float(len(tally.failures)),
            "units": len(tally.delays_s) if load.pace else units}


class Bench:
    """The processes of a measurement and the folder with their files; all ends with it."""

    def __init__(self, scale: BenchScale, upstream_port: int = 0,
                 other: tuple[int | None, int | None] = (None, None)):
        import tempfile
        self.scale, self.other = scale, other       # port and process of the other proxy
        self.folder = tempfile.mkdtemp(prefix="agproxy-bench-")
        self.children: dict[str, subprocess.Popen] = {}
        self.samples: dict[tuple[str, str, str], list] = {}     # (load, figure, subject) -> runs
        self.upstream_port, self.proxy_port = upstream_port, 0

    def __enter__(self) -> Bench:
        try:
            self.upstream_port = self._start("bench upstream", "bench", "--as-upstream",
                                             "--upstream-port", str(self.upstream_port))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        import shutil
        for name in list(self.children):
            self._end(name)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _end(self, name: str) -> None:
        child = self.children.pop(name)
        child.kill()        # nothing of it is kept, so nothing needs an orderly end
        child.wait()
        child.stdout.close()

    def _start(self, name: str, *arguments: str) -> int:
        """The port on which this file, started with those arguments, says that it listens."""
        log = os.path.join(self.folder, f"{name}.log")
        environment = {k: v for k, v in os.environ.items() if k in _BENCH_ENVIRONMENT}
        with open(log, "wb") as errors:
            child = self.children[name] = subprocess.Popen(
                [sys.executable, program_file(), *arguments], stdout=subprocess.PIPE,
                stdin=subprocess.DEVNULL, stderr=errors,
                env={**environment, "HOME": self.folder, "PYTHONIOENCODING": "utf-8"})
        guard = threading.Timer(BENCH_PATIENCE_S, child.kill)
        guard.start()
        try:
            for line in child.stdout:
                found = re.search(rb"listens on http://127\.0\.0\.1:(\d+)", line)
                if found:
                    return int(found[1])
        finally:
            guard.cancel()
        with open(log, encoding="utf-8", errors="replace") as handle:
            told = handle.read().strip().splitlines()[-1:] or ["it said nothing"]
        raise ConfigError(f"the {name} did not start: {told[0].replace('agproxy: ', '')}")

    def start_proxy(self) -> dict[str, float | None]:
        """A new proxy in place of the one before; how long its first answer took, and its memory.
        All its addresses are the bench upstream's: nothing leaves the machine."""
        if "proxy" in self.children:
            self._end("proxy")
        url = f"http://127.0.0.1:{self.upstream_port}"
        row = {"base_url": url, "token_url": url, "auth_url": url, "userinfo_url": url}
        path = os.path.join(self.folder, "accounts.json")
        write_atomic(path, json_encode({
            "settings": {"soft_limit": 0}, "providers": {"antigravity": row, "gemini-cli": row},
            "accounts": [{"name": "bench", "provider": "antigravity", "access_token": "bench",
                          "project": "bench"}]}).encode("ascii"))
        began = time.perf_counter()
        self.proxy_port = self._start("proxy", "serve", "--port", "0", "--accounts", path,
                                      "--log-file", os.path.join(self.folder, "requests.log"))
        self.load("agproxy", BENCH_START, requests=1)
        cold_s = time.perf_counter() - began
        time.sleep(0.3)         # what a start does beside the first answer
        used = process_usage(self.children["proxy"].pid)
        self.load("agproxy", BENCH_START._replace(clients=8), seconds=self.scale.warm_s * 2)
        return {"cold": cold_s * 1e3, "idle": used and used.memory_mb}

    def client(self, subject: str, load: BenchLoad) -> BenchClient:
        """The load client for a subject: the same bodies for all of them."""
        # an answer that is longer than it may be would be cut
        body = bench_body(load.size_bytes, load.turns, load.unit != "request",
                          max(32_000, 16 * load.events), load.is_new)
        port, path, ending = {
            "agproxy": self.proxy_port, "other": self.other[0], "direct": self.upstream_port,
        }[subject], "/v1/messages", b"message_stop" if body["stream"] else b"end_turn"
        if subject == "direct":         # the same bytes, to one who reads none of them
            path, ending = BENCH_DIRECT, b'"finishReason":"STOP"'
        return BenchClient(bench_request(port, path, body, ending), load.events - 1,
                           bool(load.pace))

    def checked(self, subject: str, load: BenchLoad, tally: BenchTally) -> BenchTally:
        if tally.failures:
            raise ConfigError(f"{subject}, {load.title}: {tally.failures[0]}")
        return tally

    def load(self, subject: str, load: BenchLoad, seconds: float = BENCH_PATIENCE_S,
             requests: int = sys.maxsize) -> None:
        """A load that is not measured; raises ConfigError at a wrong answer."""
        bench_tell(self.upstream_port, load.events, load.pace)
        with self.client(subject, load) as client:
            self.checked(subject, load, client.run(load.clients, seconds, requests))

    def keep(self, load: str, subject: str, figures: Mapping[str, float | None]) -> None:
        for figure, value in figures.items():
            self.samples.setdefault((load, figure, subject), []).append(value)

    def measure(self, subject: str, load: BenchLoad) -> None:
        """One load of one subject, its figures kept."""
        bench_tell(self.upstream_port, load.events, load.pace)
        pid = {"agproxy": self.children["proxy"].pid, "other": self.other[1]}.get(subject)
        midst: list[ProcessUsage | None] = []
        with self.client(subject, load) as client:
            if not load.pace:       # the rest is warm: whatever may be kept is kept by now
                self.checked(subject, load, client.run(load.clients, self.scale.warm_s))
            before = process_usage(pid)
            if load.pace:
                tally = client.live(load.clients, self.scale.ramp_s * load.clients / 1000,
                                    load.events / load.pace,
                                    lambda: midst.append(process_usage(pid)))
            else:
                tally = self.checked(subject, load, client.run(load.clients, self.scale.seconds))
            after = process_usage(pid)
        figures = bench_figures(load, tally)
        if before and after and tally.answers:
            figures["cpu"] = (after.cpu_s - before.cpu_s) * 1e6 / figures["units"]
        if midst and midst[0]:
            figures.update(memory=midst[0].memory_mb, threads=midst[0].threads or None)
        self.keep(load.key, subject, figures)

    def await_other(self) -> None:
        """Until the other proxy answers by the bench upstream, a minute at most."""
        warn(f"the bench upstream is http://127.0.0.1:{self.upstream_port}; waiting until "
             f"the proxy on port {self.other[0]} answers by it")
        deadline = time.monotonic() + 60
        while True:
            try:
                return self.load("other", BENCH_START, requests=1)
            except ConfigError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)

    def run(self, loads: Iterable[BenchLoad], told: Callable[[str], None]) -> None:
        """All loads, `runs` times, the subjects one after the other within each load, so that
        what else the machine does meets all of them."""
        if self.other[0]:
            self.await_other()
        subjects = ["agproxy", "direct", *["other"] * bool(self.other[0])]
        for run in range(self.scale.runs):
            told(f"run {run + 1} of {self.scale.runs}: start")
            self.keep("start", "agproxy", self.start_proxy())
            if self.other[0]:
                self.load("other", BENCH_START._replace(clients=8), self.scale.warm_s * 6)
            turn = run % len(subjects)
            for load in loads:
                for subject in subjects[turn:] + subjects[:turn]:
                    told(f"run {run + 1} of {self.scale.runs}: {load.title}, {subject}")
                    self.measure(subject, load)

    def grow(self, told: Callable[[str], None]) -> None:
        """The loads of BENCH_GROWTH, and memory after more and more requests."""
        for run in range(self.scale.runs):
            self.start_proxy()
            for times, more in ((1, 1), (2, 1), (4, 2)):
                told(f"run {run + 1} of {self.scale.runs}: memory")
                self.load("agproxy", BENCH_START._replace(clients=8), 600,
                          more * self.scale.requests)
                used = process_usage(self.children["proxy"].pid)
                self.keep(str(times * self.scale.requests), "agproxy",
                          {"memory": used and used.memory_mb})
            for load in (load for group in BENCH_GROWTH for load in group[3]):
                told(f"run {run + 1} of {self.scale.runs}: {load.title}")
                self.measure("agproxy", load)


def figure_text(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 99.5 or value == int(value) else f"{value:.3g}"


def bench_rows(samples: Mapping, loads: Iterable[BenchLoad]) -> list[dict]:
    """One row for each figure: medians and all samples of each subject, and the ratios, which are
    medians of the ratios within a run."""
    rows = []
    for load in loads:
        for key, (label, unit) in BENCH_FIGURES.items():
            row = {"load": load.key, "title": load.title, "figure": key, "label": label,
                   "unit": unit.format(unit=load.unit), "is_shown": key in load.figures}
            found = {subject: samples.get((load.key, key, subject), [])
                     for subject in ("agproxy", "direct", "other")}
            if median(found["agproxy"]) is None and not row["is_shown"]:
                continue
            for subject, values in found.items():
                pairs = [a / b for a, b in zip(found["agproxy"], values) if a is not None and b]
                row[subject] = {"median": median(values), "samples": values,
                                "ratio": median(pairs) if subject != "agproxy" else None}
            rows.append(row)
    return rows


def bench_cell(cell: Mapping) -> str:
    """A median, with half the distance of its samples where there are several."""
    known = [v for v in cell["samples"] if v is not None]
    middle, spread = cell["median"], (max(known) - min(known)) / 2 if known else 0.0
    return figure_text(middle) + (f" ±{spread / middle:.0%}" if spread and middle else "")


def bench_table(rows: Iterable[Mapping], subjects: tuple) -> list[str]:
    """The shown rows as aligned lines under the titles of their loads."""
    others = subjects[1:]
    lines = [f"{'':47}" + "".join(f"{s:>17}" for s in subjects)
             + "".join(f"{'to ' + s:>11}" for s in others)]
    title = ""
    for row in (row for row in rows if row["is_shown"]):
        if row["title"] != title:
            title = row["title"]
            lines += ["", title]
        lines.append(f"  {row['label']:32}{row['unit']:13}"
                     + "".join(f"{bench_cell(row[s]):>17}" for s in subjects)
                     + "".join(f"{figure_text(row[s]['ratio']):>11}" for s in others))
    return lines


def growth_rows(samples: Mapping, requests: int) -> list[dict]:
    """One row for each claim: its figures in order, how they grow, and whether the claim holds."""
    rows = []
    for title, unit, claim, loads in BENCH_GROWTH:
        per = [float(load.title.replace(",", "")) if unit == "KB" else 1.0 for load in loads]
        medians = [median(samples.get((load.key, "cpu", "agproxy"), ())) for load in loads]
        values = [m and m / p for m, p in zip(medians, per)]
        growth = values[-1] / min(values[:-1]) if all(values) else None
        rows.append({
            "title": title, "claim": claim, "growth": growth,
            "cells": [(f"{load.title} {unit}", v, "us") for load, v in zip(loads, values)],
            "told": f"the last is {growth or 0:.2f} times the least before it",
            "holds": growth and growth <= BENCH_SLACK})
    counts = [requests, 2 * requests, 4 * requests]     # by the second, what is bounded is full
    values = [median(samples.get((str(n), "memory", "agproxy"), ())) for n in counts]
    growth = (values[-1] - values[1]) * 1e3 / (2 * requests) if all(values) else None
    rows.append({
        "title": "memory after", "growth": growth,
        "claim": "memory does not grow with finished requests",
        "cells": [(f"{n:,} requests", v, "MB") for n, v in zip(counts, values)],
        "told": f"{growth or 0:+.2f} KB a request in the second half, of a KB each",
        "holds": growth is not None and growth <= BENCH_MEMORY_SLACK})
    return rows


def growth_table(rows: Iterable[Mapping]) -> list[str]:
    lines = []
    for row in rows:
        lines.append(row["title"])
        lines += [f"  {label:>16}{figure_text(value):>12} {unit}"
                  for label, value, unit in row["cells"]]
        told = ("not measured on this system" if row["growth"] is None else
                f"{'holds' if row['holds'] else 'does not hold'}: {row['told']}")
        lines += [f"  {row['claim']}: {told}", ""]
    return lines[:-1]


def other_port(url: str | None) -> int | None:
    """The port of the other proxy; raises ConfigError unless it is on this machine."""
    if not url:
        return None
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "http" or parts.hostname not in ("127.0.0.1", "localhost"):
        raise ConfigError(f"--against takes http://127.0.0.1:PORT, not {url}: this program sends "
                          "no load to other machines")
    try:
        return parts.port or 80
    except ValueError as err:
        raise ConfigError(f"--against: {err}") from None


def bench_loads(scale: BenchScale, descriptors: int) -> tuple[list[BenchLoad], list[str]]:
    """The loads at that scale, and what is to be said about them."""
    most, loads, notes = max(1, (descriptors - 100) // 2), [], []
    for load in BENCH_LOADS:
        if load.pace:
            if load.clients > most:     # two for each stream in the proxy
                notes.append(f"{most:,} live streams instead of {load.clients:,}: a process may "
                             f"hold {descriptors:,} descriptors here")
            clients = min(load.clients, most)
            load = load._replace(clients=clients, events=scale.live_events,
                                 title=f"{clients:,} {load.title}")
        loads.append(load)
    return loads, notes


def command_bench(args: argparse.Namespace) -> int:
    import platform
    descriptors = raise_descriptor_limit()
    if args.as_upstream:
        upstream = BenchUpstream(args.upstream_port)
        say(f"bench upstream listens on {upstream.url}")
        upstream.serve()
    port, pid = other_port(args.against), args.against_pid
    if pid and process_usage(os.getpid()) and not process_usage(pid):
        raise ConfigError(f"--against-pid: there is no process {pid}")
    scale = BENCH_SCALES["quick" if args.quick else "full"]
    scale = scale._replace(runs=args.runs or scale.runs)
    for name in ("SIGTERM", "SIGHUP"):      # end as Ctrl-C does: with all children
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.default_int_handler)

    def told(text: str) -> None:
        if sys.stderr.isatty():
            print(f"\r{text[:78]:78}", end="\r", file=sys.stderr, flush=True)
    loads, notes = bench_loads(scale, descriptors)
    with Bench(scale, args.upstream_port, (port, pid)) as bench:
        bench.grow(told) if args.growth else bench.run(loads, told)
        told("")
    notes.append("CPU is user and system time of the proxy's processes, by the operating system's "
                 "account." if process_usage(os.getpid()) else
                 "CPU and memory are not measured on this system: wall-clock figures only.")
    result = {"program": f"agproxy {VERSION}", "system": platform.system(),
              "machine": platform.machine(), "cores": os.cpu_count(),
              "python": f"{platform.python_implementation()} {platform.python_version()}",
              **scale._asdict(), "notes": notes}
    result["rows"] = (growth_rows(bench.samples, scale.requests) if args.growth
                      else bench_rows(bench.samples, (BENCH_START, *loads)))
    if args.json:
        say(json.dumps(result, indent=1))
        return 0
    say("agproxy {0} bench: median of {runs} on {system} {machine}, {cores} cores, {python}".format(
        VERSION, **result), "Ratios count, figures are of this machine.")
    say("", *(growth_table(result["rows"]) if args.growth else
              bench_table(result["rows"], ("agproxy", "direct") + ("other",) * bool(port))))
    say("", *notes)
    return 0


def rooms(path: str) -> list[tuple[int, int, str]]:
    """(line, number, title) of each banner of a source file."""
    banner = re.compile(r"# ── (\d+)\. (.+?) ─+$")
    with open(path, encoding="utf-8") as handle:
        return [(line, int(m[1]), m[2]) for line, text in enumerate(handle, 1)
                for m in (banner.match(text.rstrip("\n")),) if m]


def command_map(args: argparse.Namespace) -> int:
    say(*(f"{number:>3}. {title:32} line {line}"
          for line, number, title in rooms(SOURCE)))
    return 0


def command_version(args: argparse.Namespace) -> int:
    say(f"agproxy {VERSION} on Python {sys.version.split()[0]}")
    return 0


COMMANDS = {        # name -> (function, help, whether it takes the options of a server)
    "serve": (command_serve, "serve clients until stopped (the default)", True),
    "run": (command_run, "start a client with the proxy behind it: run claude ...", True),
    "accounts": (command_accounts, "add, list, verify, remove, import ... accounts", False),
    "quota": (command_quota, "what is left, until when, and how fast it goes", False),
    "why": (command_why, "why a request went where it went: why REQUEST-ID, or why last", False),
    "explain": (command_explain, "which account would serve a model now", False),
    "routes": (command_routes, "which role or rule sends what where: routes [ROLE [MODEL]]", False),
    "groups": (command_groups, "create, add, move, remove, test, list, delete groups", False),
    "alias": (command_alias, "names for models: alias [NAME [MODEL ...]]", False),
    "models": (command_models, "list models and the accounts that serve them", False),
    "bench": (command_bench, "measure this proxy beside a direct connection, or another", False),
    "map": (command_map, "print the rooms of this file with their lines", False),
    "version": (command_version, "print the version", False),
}


def _add_server_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--port", "-p", type=int, help="8080; 0 takes any free port")
    command.add_argument("--host", help="127.0.0.1; others need PROXY_API_KEY")
    command.add_argument("--tls-cert", metavar="FILE", help="PEM certificate: serve by TLS")
    command.add_argument("--tls-key", metavar="FILE", help="its key, if that is another file")
    command.add_argument("--strategy", choices=STRATEGY_NAMES, metavar="NAME",
                         help=", ".join(STRATEGY_NAMES))
    command.add_argument("--soft-limit", metavar="FRACTION",
                         help="pass over accounts with less quota left (0.20)")
    command.add_argument("--no-soft-limit", dest="soft_limit", action="store_const", const="0")
    for flag, about in (("--fallback", "serve a model's pair when it is exhausted"),
                        ("--pid-offset", "begin with another account in each process"),
                        ("--auto-refresh", "start 5 h windows as soon as they may begin")):
        command.add_argument(flag, action="store_const", const="true", help=about)
    command.add_argument("--max-empty-retries", type=int, metavar="N")
    command.add_argument("--log-file", metavar="FILE", help="log here instead of the terminal")


def whole_count(text: str) -> int:
    if not re.fullmatch(r"0*[1-9]\d{0,2}", text):
        raise argparse.ArgumentTypeError(f"a whole number from 1 to 999 is required, not {text!r}")
    return int(text)


def _add_account_actions(command: argparse.ArgumentParser) -> None:
    actions = command.add_subparsers(dest="action", metavar="ACTION")
    command.set_defaults(json=False, models=False)
    for name, (_, about, argument, count) in ACCOUNT_ACTIONS.items():
        action = actions.add_parser(name, help=about, description=about)
        # given before or after the action
        action.add_argument("--accounts", metavar="FILE", default=argparse.SUPPRESS,
                            help="accounts.json to use")
        action.add_argument("--demo", action="store_true", default=argparse.SUPPRESS,
                            help=argparse.SUPPRESS)
        if argument:
            action.add_argument(argument, nargs=count, metavar=argument.upper())
        if name == "list":
            action.add_argument("--json", action="store_true")
            action.add_argument("--models", action="store_true", help="single models too")
        if name == "add":
            action.add_argument("--provider", default="antigravity", metavar="P")
            action.add_argument("--name", metavar="N", help="label in log and headers")
            action.add_argument("--project", metavar="P", help="Cloud Code project")
            action.add_argument("--no-browser", action="store_true", help="print the link only")
            action.add_argument("--refresh-token", metavar="-", help="`-` reads it from stdin")
            action.add_argument("--key", metavar="-", help="`-` reads it from stdin")


def _add_group_actions(command: argparse.ArgumentParser) -> None:
    actions = command.add_subparsers(dest="action", metavar="ACTION")
    for name, (_, about, has_models) in GROUP_ACTIONS.items():
        action = actions.add_parser(name, help=about, description=about)
        action.add_argument("--accounts", metavar="FILE", default=argparse.SUPPRESS,
                            help="accounts.json to use")
        if name != "list":
            action.add_argument("name", metavar="NAME")
        if has_models:
            action.add_argument("models", nargs="+", metavar="MODEL")
        if name == "create":
            action.add_argument("--strategy", default="priority", choices=GROUP_STRATEGIES)


def _add_bench_options(command: argparse.ArgumentParser) -> None:
    for flag, about in (("--quick", "a quarter of a minute instead of two minutes"),
                        ("--growth", "how costs grow with streams, bodies and requests instead"),
                        ("--json", "all samples and medians"), ("--as-upstream", None)):
        command.add_argument(flag, action="store_true", help=about or argparse.SUPPRESS)
    command.add_argument("--runs", type=whole_count, metavar="N", help="medians of N runs (3)")
    command.add_argument("--against", metavar="URL",
                         help="another proxy on this machine, set up for the bench upstream")
    command.add_argument("--against-pid", type=int, metavar="PID", help="its process, for its CPU")
    command.add_argument("--upstream-port", type=int, default=0, metavar="N",
                         help="where the bench upstream listens; else any free port")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="agproxy.py", description="Any AI coding client on any model account you own.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  python3 agproxy.py serve --demo\n"
               "  python3 agproxy.py run --demo claude -p hello")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, (_, about, is_server) in COMMANDS.items():
        command = commands.add_parser(name, help=about, description=about)
        command.add_argument("--accounts", metavar="FILE", help="accounts.json to use")
        command.add_argument("--demo", action="store_true", help="simulated accounts, no network")
        command.add_argument("--debug", action="store_true", default=bool(os.environ.get("DEBUG")),
                             help="more lines in the log, traces on errors")
        if is_server:
            _add_server_options(command)
        if name == "serve":
            command.add_argument("--workers", type=whole_count, default=1, metavar="N",
                                 help="processes that serve the port (1); not on Windows")
            command.add_argument("--as-worker", type=lambda text: AsWorker(*json.loads(text)),
                                 help=argparse.SUPPRESS)
        if name == "run":
            command.add_argument("client", help="program to start, for example claude")
            command.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
        if name == "accounts":
            _add_account_actions(command)
        if name == "quota":
            command.add_argument("--watch", action="store_true", help="again every minute")
            command.add_argument("--models", action="store_true", help="single models too")
        if name == "bench":
            _add_bench_options(command)
        if name in ("quota", "why"):
            command.add_argument("--json", action="store_true")
        if name == "why":
            command.add_argument("id", metavar="REQUEST-ID", help="or `last`")
        if name == "explain":
            command.add_argument("model")
        if name == "routes":
            command.add_argument("role", nargs="?", metavar="ROLE", help=", ".join(ROUTE_ROLES))
            command.add_argument("to", nargs="?", metavar="MODEL", help="none removes the role")
            command.add_argument("--over", type=int, metavar="TOKENS", help="of long_context")
        if name == "alias":
            command.add_argument("name", nargs="?", metavar="NAME", help="may hold `*`")
            command.add_argument("models", nargs="*", metavar="MODEL", help="none removes it")
        if name == "groups":
            _add_group_actions(command)
    return parser


def tell_crash(kind: type, err: BaseException, trace: Any, *thread: Any) -> None:
    """The trace of what nobody expected, without secrets: messages of exceptions hold what they
    were given."""
    lines = "".join(traceback.format_exception(kind, err, trace)).splitlines()
    print(*(redact(line) for line in lines), sep="\n", file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments = ["serve", *arguments]
    args = build_parser().parse_args(arguments)
    args.given = arguments
    try:
        return COMMANDS[args.command][0](args)
    except BrokenPipeError:         # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ConfigError, ProxyError, OSError) as err:
        if args.debug:
            tell_crash(type(err), err, err.__traceback__)
        print(f"agproxy: {redact(cause(err))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.excepthook, threading.excepthook = tell_crash, lambda told: tell_crash(*told)
    sys.exit(main())
