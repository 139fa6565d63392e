#!/bin/sh
"exec" "python3" "-IS" "-c" "import sys; exec(open(sys.argv[1], 'rb').read(4096).split(b'\\n###')[1])" "$0" "$@"
needs: str = "Python 3.8 or later"     # a much older one can read no further, and shows this line

# The second line is for both languages.  A script is compiled anew at every start, which takes longer than a small
# job; so sh hands it to Python, which reads the text between the marks here and, by it, loads this file as a module
# whose bytecode is kept beside it.  Where others could write file, bytecode or folder, and so plant something, none is
# used.  The collector of cycles would look through all that is imported several times over; main() or the tool turns it
# on again.  Started as `python3 cexec.py` all this is one string without effect.
'''
###
import _frozen_importlib_external as importing, _signal, gc, os
gc.disable()
if _signal.getsignal(_signal.SIGINT) is not _signal.SIG_IGN:
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
del sys.argv[0]
path = os.path.realpath(sys.argv[0])
try:
    if sys.argv[-1].endswith("\r") and b"\r\n" in open(path, "rb").read(999):
        sys.stderr.write("%s: this copy has the line ends of DOS (CR LF), which sh cannot read\n"
                         "  to mend it: sed -i 's/\\r$//' %s\n" % (sys.argv[0], path))
        sys.exit(2)
    kept = importing.cache_from_source(path)
    places = [os.stat(place) for place in (path, os.path.dirname(path), kept, os.path.dirname(kept))
              if os.path.exists(place)]
    mask = os.umask(0o22)
    safe = all(not place.st_mode & 0o22 and place.st_uid in (0, os.geteuid()) for place in places)
    code = (importing.SourceFileLoader("__main__", path).get_code("__main__") if safe else
            compile(open(path, "rb").read(), path, "exec", dont_inherit=True))
    os.umask(mask)
except OSError as error:
    sys.exit("%s: %s" % (sys.argv[0], error))
except SyntaxError as error:
    if error.lineno == 3:       # a much older Python: the line that it shows says so
        raise
    sys.stderr.write("%s: this copy is not whole: copy it again\n" % path)
    sys.exit(111)
sys.modules["__main__"].__file__ = path
exec(code, sys.modules["__main__"].__dict__)
###
'''

# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the cexec authors

__doc__ = """cexec: ad-hoc clusters in one file.

Copy this file to every machine of a room.  `ckeygen app` makes a key once; `cservice app COMMAND` on the workers serves
jobs; `cexec app.pub < in > out` runs COMMAND on the best of them as if it were local: every descriptor, the exit
status, Ctrl-C.  `cmap` runs it for each of many inputs, `cwho` calls the roll, `crat` logs what happened, `cproxy`
joins networks, `demo` shows it all on one machine.  The tool is the name the file is called by (a symbolic link) or its
first argument.  `import cexec` gives programs the same: see Room.

How a job flows:

    cexec                                          cservice
    announces on UDP              - GROUP ->       every worker sets a timer: the idler, the shorter
    ranks who connects            <-  TCP -        the first ones connect and say what they are worth
    takes the first proven one    <-  TLS ->       forks a handler, which shows the other half of the key
    sends job and data            - session ->     runs COMMAND in a group of its own
    writes data, ends as it did   <- session -     sends data and the exit status
    tells how it went             - GROUP ->       crat prints a line

The map, in the order of the file.  Above the line all is pure: bytes, times and chance come in as arguments.

    numbers              exit statuses, ports, sizes with their reasons
    errors               what a user hears; what a parser raises; printing safely
    groups               GROUP, addresses and ports as users write them
    settings             one table: variable, option, default, help
    wire                 every datagram and message, encoder beside decoder
    keys                 P-256, RFC 6979, HKDF, DER and PEM; the two halves of a key
    session              one connection's phases as a table; streams with credit; silence
    calls                what an Executor and its interpreters say to each other
    slots                the states of a worker's slot
    jobs                 the states of a job at its submitter; whom it avoids; why it waits, in words
    choice               which worker answers when (Responder), which ones are taken (Selection)
    batch                many jobs: what runs again, where, what counts, what is delivered next
    --- the line: below it the program touches the world
    TLS                  the one way to make a channel
    log                  what the tools that keep running say, without flooding
    loop                 descriptors, timers, signals and threads as calls
    group sockets        broadcast and multicast by every interface
    TCP listeners        ports for what comes back; connections out and in
    this machine         CPUs, quotas, limits, speed
    streams              reading and writing descriptors that others share; what a job did not read stays
    channel              moves bytes between connection, session and streams
    children             starting a job, ending all of it
    terminals            the user's terminal, and the job's
    discovery            from an announcement to a proven worker
    job streams          what a job reads and writes here; what is held until it has ended
    pool                 queue, connections, retries of lost workers, why nobody answers
    cexec, cmap          one job with this process's descriptors; many jobs with one result
    cservice             the daemon; what stands beside its jobs; the handler of a connection's jobs
    cwho, crat, cproxy   the roll call and its diagnosis; which alerts are true and new; two networks joined
    key files and ckeygen
    the loop of calls    what runs in each interpreter of `cservice --python`
    the Python API       Room
    Executor             the room as a pool of Python functions
    demo
    the tools            their table, usage, main
"""

import sys

if sys.version_info < (3, 8):
    # Only what Python 2 and the first 3 understand may stand above.
    import os
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    newer = ["python3.%d" % minor for minor in range(30, 7, -1)
             if any(os.access(os.path.join(folder, "python3.%d" % minor), os.X_OK) for folder in folders)]
    words = "cexec: needs Python 3.8 or later, this is %d.%d, %s" % (sys.version_info[:2] + (sys.executable,))
    if newer:
        words += "; use the newer one: %s %s" % (newer[0], sys.argv[0])
    if __name__ != "__main__":
        raise ImportError(words)
    sys.stderr.write(words + "\n")
    raise SystemExit(2)

if __name__ == "__main__":
    import _signal
    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
        _signal.signal(_signal.SIGINT, _signal.SIG_DFL)     # until main() can catch it: no traceback, and loops end

try:
    import _thread, binascii, collections, enum, errno, fcntl, functools, gc, hashlib, heapq, hmac, io, math
    import operator, os, select, signal, socket, stat, struct, time
except ImportError as missing:
    if __name__ != "__main__":
        raise
    sys.stderr.write("cexec: this Python is not complete: %s\n  install the whole of it, as with: apt install python3\n"
                     % missing)
    raise SystemExit(2)

if __name__ == "__main__":
    # Nothing but a cut copy lets the interpreter come to its end: main() ends by os._exit().
    import atexit
    atexit.register(lambda: (sys.stderr.write("%s: this copy is not whole: copy it again\n" % sys.argv[0]),
                             sys.stderr.flush(), os._exit(111)))

VERSION = "1.0"
ssl = None      # tls_context() imports it: it takes as long as all the others, and cexec has announced its job by then

# ---------------------------------------------------------------- numbers

EXIT_SOME_FAILED = 1        # of cmap
EXIT_USAGE = 2
EXIT_TIMEOUT = 124          # a job ran for longer than it may: what timeout(1) says
EXIT_TEMPORARY = 111        # the cluster failed, try again later: the old convention of qmail and its kin

PORT = 3010                 # UDP, announcements and alerts
LINUX, MACOS = sys.platform.startswith("linux"), sys.platform == "darwin"

# Sizes, bytes.
FRAME_MAX = 1 << 22         # longest data message: the largest window at once
CONTROL_MAX = 1 << 16       # longest other message: a job with a thousand NAME=VALUE fits, a flood does not
WINDOW_START = 1 << 19      # credit at the start, two buffers: more is no faster on a short path and costs memory
WINDOW_MAX = 1 << 22        # credit on a long path (40 ms at 100 MB/s), bounded in sum by WINDOWS_MAX
WINDOW_NEAR = 1 << 21       # credit on a short path while the flow is fast
WINDOWS_MAX = 1 << 24       # sum of one receiver's windows; what a blocked reader can cost in memory
RECORD = 1 << 14            # the most that one record of TLS carries
TLS_PIECE = 1 << 16         # bytes given to TLS at a time: larger ones make a sender that paces (bbr) wait
BARREN_MAX = 1 << 16        # bytes of a connection without any data: a record of TLS is shorter
BUFFER = 1 << 18            # one read or one write of the channel: sixteen TLS records
BUFFER_START = 1 << 14      # at first, until one was full: a small job needs no more
LONG_TRIP = 0.005           # seconds: a path whose window may grow to WINDOW_MAX
FAST_QUARTER = 0.005        # seconds in which a fast flow consumes a quarter of its window
FD_SETSIZE = 1024           # select(2) takes no descriptor from here on
DESCRIPTOR_MAX = 1 << 15    # highest descriptor number a job may have: the wire's field is 16 bits wide


# ---------------------------------------------------------------- errors

class Failure(Exception):
    """What the user must hear: what failed, why, and what to do: `what`, `why`, `hint`.  The tools catch it in main
    only."""

    def __init__(self, what, why="", hint="", status=EXIT_TEMPORARY):
        super().__init__(what, why, hint, status)
        self.what, self.why, self.hint, self.status = what, str(why), hint, status

    def __str__(self):
        return ": ".join(part for part in (self.what, self.why) if part)


class ProtocolError(Exception):
    """Bytes from a peer that the protocol does not allow.  The only error of the pure parsers."""


def printable(text):
    """The text with every control character escaped: what strangers sent must not drive a terminal or split a line."""
    if isinstance(text, bytes):
        text = text.decode("utf-8", "backslashreplace")
    return text if text.isprintable() else "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode("ascii") for c in text)


def printable_lines(text):
    """The same for a text of lines, which stay so."""
    return "\n".join(printable(line.expandtabs()) for line in text.split("\n"))


def count_text(number, what):
    return "%d %s%s" % (number, what, "" if number == 1 else "s")


def reason_of(error):
    """The system's words for an OSError, or the error's own."""
    words = getattr(error, "strerror", None) or str(error) or type(error).__name__
    if MACOS and getattr(error, "errno", None) == errno.EHOSTUNREACH:
        words += " (macOS 15 lets no background program into the local network unless that is allowed in System " \
            "Settings, Privacy & Security, Local Network)"
    return words


class Recent(collections.OrderedDict):
    """A dictionary of at most `most` entries: the one that was set longest ago makes room."""

    def __init__(self, most):
        super().__init__()
        self.most = most

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        self.move_to_end(key)
        if len(self) > self.most:
            self.popitem(last=False)


def say(prefix, text, descriptor=2):
    """Writes one line; an error descriptor that is closed or full costs the line, never the program."""
    line = "%s: %s\n" % (prefix, printable(text)) if prefix else printable(text) + "\n"
    try:
        os.write(descriptor, line.encode("utf-8", "replace"))
    except OSError:
        pass


# ---------------------------------------------------------------- groups

GROUP_FORMS = "an address, not a name: 255.255.255.255, 224.0.1.9, ff02::1%eth0, 10.0.0.7, " \
    "with a port as 10.0.0.7:3010 or [ff02::1%eth0]:3010, with a device as eth0:255.255.255.255 or eth0"
PORTS_FORMS = "ports from 1024 to 65535, as 4000 or 4000,4002 or 4000-4010"
DEVICE_MAX = 15             # bytes of an interface's name, a limit of every kernel
ALL_HOSTS = "255.255.255.255"
LOOPBACK_NAMES = ("lo", "lo0")


class Group(collections.namedtuple("Group", "device address family port kind scope")):
    """Where datagrams go.

    device   the only interface to use, for sending and for receiving; "" for all
    address  numeric, without scope       family  AF_INET or AF_INET6       port  UDP
    kind     "broadcast" (the global one), "multicast" or "unicast"; a subnet's broadcast looks like unicast
    scope    the interface named after the % of an IPv6 address; "" if none
    """
    __slots__ = ()
    only = property(lambda self: self.device or self.scope, doc="The one interface that may be used, or \"\".")

    @property
    def loopback(self):
        """Whether nothing sent there leaves this host."""
        return (self.address.startswith("127.") or self.address == "::1" or self.only in LOOPBACK_NAMES
                or self.kind == "multicast" and self.address.startswith(("ff01:", "ff11:")))

    def __str__(self):
        address = self.address + ("%" + self.scope if self.scope else "")
        return ((self.device + ":" if self.device else "")
                + ("[%s]:%d" if self.family == socket.AF_INET6 else "%s:%d") % (address, self.port))


def parse_group(text):
    """The Group that a GROUP or TARGET names: [DEVICE:]ADDRESS[:PORT].  ValueError says what is accepted.

    What reads as an address without a device is one, so a device called like hexadecimal digits needs
    brackets around the IPv6 address that follows it.
    """
    words = text.strip()
    found = split_target(words)
    device, colon, rest = words.partition(":")
    if not found and device_name(device):
        found = split_target(rest or ALL_HOSTS)
    else:
        device = ""
    if not found:
        raise ValueError(GROUP_FORMS)
    (address, family, scope), port = found
    kind = kind_of(address, family)
    if device and scope and device != scope:
        raise ValueError("one device, not both %s and %s" % (device, scope))
    if kind == "unicast" and address.startswith(("fe8", "fe9", "fea", "feb")) and not (scope or device):
        raise ValueError("a link-local address needs its device, as in %s%%eth0" % address)
    return Group(device, address, family, port, kind, scope)


def split_target(text):
    """((address, family, scope), port) of ADDRESS[:PORT]; None for anything else."""
    address, after = parse_address(text), ""
    if text.startswith("["):
        inside, closed, after = text[1:].partition("]")
        address = parse_address(inside) if closed and ":" in inside else None
    elif not address:
        inside, colon, after = text.partition(":")
        address, after = parse_address(inside), colon + after
    port = parse_port(after[1:], 1) if after[:1] == ":" else None if after else PORT
    return (address, port) if address and port else None


def parse_address(text):
    """(address, family, scope) of a numeric address that something can be sent to; None for anything else."""
    bare, percent, scope = text.partition("%")
    family = socket.AF_INET6 if ":" in bare else socket.AF_INET
    try:
        packed = socket.inet_pton(family, bare)
    except (OSError, ValueError):
        return None
    if percent and not (family == socket.AF_INET6 and device_name(scope)):
        return None
    # The zero addresses name no machine.  IPv4 inside IPv6 would name a second way to say the same.
    if not any(packed) or family == socket.AF_INET6 and packed.startswith(bytes(10) + b"\xff\xff"):
        return None
    return socket.inet_ntop(family, packed), family, scope


def address_text(address):
    """ADDRESS:PORT of a socket address."""
    return ("[%s]:%d" if ":" in address[0] else "%s:%d") % address[:2]


def device_name(text):
    """Whether an interface could be called so."""
    return (0 < len(text.encode("utf-8", "replace")) <= DEVICE_MAX and text.isprintable()
            and not any(c in " /:[]%," for c in text) and not text.replace(".", "").isdigit())


def kind_of(address, family):
    if address == ALL_HOSTS:
        return "broadcast"
    first = socket.inet_pton(family, address)[0]
    multicast = first == 0xff if family == socket.AF_INET6 else 224 <= first < 240
    return "multicast" if multicast else "unicast"


def whole(text):
    """Whether this is a number of a size that anything here may have."""
    return text.isascii() and text.isdigit() and len(text) <= 12


def parse_port(text, least):
    """The number of a port; None unless it is one from `least` on."""
    return int(text) if whole(text) and least <= int(text) <= 65535 else None


def parse_ports(text):
    """[(low, high), ...] of `a,b,c`, `a:b` and `a-b`.  A worker connects to no port below 1024, so none is accepted."""
    ranges = []
    for word in text.replace(",", " ").split():
        low, dash, high = word.replace(":", "-").partition("-")
        ranges.append((parse_port(low, 1024), parse_port(high if dash else low, 1024)))
    if not ranges or not all(low and high and low <= high for low, high in ranges):
        raise ValueError(PORTS_FORMS)
    return ranges


# ---------------------------------------------------------------- settings

class Setting(collections.namedtuple("Setting", "attribute names tools parse default argument help")):
    """One thing a user may set: by the first of `names` found in the environment, or by the option."""
    __slots__ = ()

    @property
    def options(self):
        """The option of each name, the one that help shows first."""
        words = [name.partition("_") for name in self.names]
        return ["--" + (rest if tool.lower() in TOOL_NAMES else tool + _ + rest).lower().replace("_", "-")
                for tool, _, rest in words]

    option = property(lambda self: self.options[0])


def whole_number(low, high):
    def parse(text):
        if not whole(text) or not low <= int(text) <= high:
            raise ValueError("a whole number from %d to %d" % (low, high))
        return int(text)
    return parse


def seconds(low, high):
    def parse(text):
        try:
            value = float(text) if set(text) <= set("0123456789.e+") else -1
        except ValueError:
            value = -1
        if not low <= value <= high:
            raise ValueError("seconds, from %d to %d" % (low, high))
        return value
    return parse


def optional(parse):
    """The parser that takes the empty text as well, for None."""
    return lambda text: parse(text) if text else None


def switch(text):
    if text not in ("", "0", "1"):
        raise ValueError("0 or 1")
    return text == "1"


def parse_hosts(text):
    """Numeric addresses, in the form the system prints them, and names of hosts, separated by spaces or commas."""
    hosts = []
    for word in text.replace(",", " ").split():
        found = parse_address(word[1:-1] if word[0] + word[-1] == "[]" else word)
        if not found and not is_host_name(word):
            raise ValueError("addresses as 10.0.0.7 or fe80::7%eth0, and names of hosts, separated by spaces or commas")
        hosts.append(found[0] + ("%" + found[2] if found[2] else "") if found else word.lower())
    return tuple(hosts)


def is_host_name(text):
    """Whether a host could be called so; what looks like an address is none."""
    letters = text.replace("-", "").replace(".", "").replace("_", "")
    return (len(text) <= 253 and letters.isascii() and letters.isalnum() and text[0] not in "-."
            and not text.rpartition(".")[2].isdigit())


def is_wanted(settings, address, own="", name=""):
    """Whether --accept-server and --reject-servers allow a worker with this address; what it says of itself, its own
    address and its name, counts for rejecting only."""
    said = {address, own, name.lower(), name.lower().partition(".")[0]}
    return not said.intersection(settings.reject_servers) and (
        not settings.accept_server or address in settings.accept_server)


def parse_escape(text):
    if text == "none":
        return b""
    if len(text) != 1 or not text.isascii() or not text.isprintable():
        raise ValueError("one printable character, or none")
    return text.encode()


def parse_user(text):
    """None for the empty text; "" for none."""
    if not text.isprintable() or len(text.encode()) > USER_MAX:
        raise ValueError("USER@HOST, at most %d bytes, or none" % USER_MAX)
    return "" if text == "none" else text or None


def one_of(*words):
    def parse(text):
        if text not in words:
            raise ValueError(" or ".join(filter(None, words)))
        return text
    return parse


def bytes_in(text):
    """The number that SIZE, as people write it, stands for: 512, 64k, 8MB, 1.5M, 8MiB; 0 for what is no size."""
    number, unit = text.lower(), 0
    for ending in ("ib", "b"):
        if number.endswith(ending) and (ending == "b" or number[-3:-2] in ("k", "m", "g", "t")):
            number = number[:-len(ending)]
            break
    if number[-1:] and number[-1] in "kmgt":
        number, unit = number[:-1], 10 + 10 * "kmgt".index(number[-1])
    before, point, behind = number.partition(".")
    if not whole(before + behind) or not before:
        return 0
    return int(float(number) * (1 << unit)) if point else int(number) << unit


def parse_size(text):
    """Bytes; 0 for the empty text."""
    if text and not bytes_in(text):
        raise ValueError("a number of bytes above 0; k, M or G behind it for 1024, 1024 k, 1024 M")
    return bytes_in(text)


def parse_spill(text):
    """Bytes; a number without a unit means MiB."""
    size = bytes_in(text + "M" if whole(text) else text)
    if not size >> 20:
        raise ValueError("a size of at least 1 MiB: a number of MiB, or with k, M or G behind it")
    return size


def parse_limits(text):
    """[(name, number)] of NAME=VALUE, separated by commas or spaces; of one name the last counts."""
    limits = {}
    for word in text.replace(",", " ").split():
        name, _, value = word.partition("=")
        limits[name] = bytes_in(value) if name in ("memory", "file") or whole(value) else 0
        if name not in ("wall", "cpu", "memory", "file", "processes") or not limits[name]:
            raise ValueError("wall=SECONDS, cpu=SECONDS, memory=BYTES, file=BYTES (k, M or G behind it), processes=N, "
                             "separated by commas")
    return list(limits.items())


def parse_allowed(text):
    """{NAME: [PATTERN]} of lines NAME=PATTERN; of several for a NAME each will do."""
    allowed = {}
    for line in text.split("\n") if text else ():
        name, equals, pattern = line.partition("=")
        if not equals or not is_name(name.encode("utf-8", "replace")):
            raise ValueError("NAME=PATTERN, a shell's pattern for the whole value; several on lines of their own")
        allowed.setdefault(name, []).append(pattern)
    return allowed


TOOL_NAMES = CEXEC, CMAP, CSERVICE, CWHO, CRAT, CPROXY = "cexec", "cmap", "cservice", "cwho", "crat", "cproxy"

SETTINGS = (
    Setting("group", ("CEXEC_GROUP", "GROUP"), (CEXEC, CMAP, CWHO), parse_group, "255.255.255.255", "GROUP",
            "where announcements go: [DEVICE:]ADDRESS[:PORT]"),
    Setting("group", ("GROUP",), (CSERVICE, CRAT, CPROXY), parse_group, "255.255.255.255", "GROUP",
            "where announcements are heard: [DEVICE:]ADDRESS[:PORT]"),
    Setting("timeout_accept", ("CEXEC_TIMEOUT_ACCEPT",), (CEXEC, CMAP), optional(seconds(0, 10 ** 6)), "", "SECONDS",
            "most time to wait for a worker, 0 for ever (default: 60 s without a word from any worker)"),
    Setting("timeout_pingpong", ("CEXEC_TIMEOUT_PINGPONG",), (CEXEC, CMAP), seconds(1, 86400), "60", "SECONDS",
            "silence after which a worker is lost"),
    Setting("listen_ports", ("CEXEC_LISTEN_PORTS", "CEXEC_LISTEN_PORT", "CEXEC_PORTS", "CEXEC_PORT"),
            (CEXEC, CMAP, CWHO, CPROXY), optional(parse_ports), "", "PORTS",
            "ports for what workers answer, UDP and TCP: a,b,c and ranges a:b or a-b"),
    Setting("accept_server", ("CEXEC_ACCEPT_SERVER", "CEXEC_ACCEPT_SERVERS"), (CEXEC, CMAP, CWHO), parse_hosts, "",
            "HOSTS", "only these workers: addresses, or names that this machine knows, separated by spaces"),
    Setting("reject_servers", ("CEXEC_REJECT_SERVERS", "CEXEC_REJECT_SERVER"), (CEXEC, CMAP, CWHO), parse_hosts, "",
            "HOSTS", "not these workers: addresses or names, also as cwho shows them"),
    Setting("max_fd", ("CEXEC_MAXFD", "MAXFD"), (CEXEC,), whole_number(2, 4096), "32", "N",
            "highest descriptor that is carried"),
    Setting("errors_fd", ("CEXEC_FD_FOR_ERRORS",), (CEXEC,), optional(whole_number(3, 1 << 20)), "", "N",
            "descriptor, above CEXEC_MAXFD, that gets cexec's own error line"),
    Setting("retries", ("CEXEC_RETRIES",), (CEXEC, CMAP), whole_number(0, 100), "3", "N",
            "how often a job that lost its worker (cexec: before its first output) starts again"),
    Setting("jobs", ("CMAP_JOBS",), (CMAP,), whole_number(1, 1000), "256", "N", "-j N: most jobs at once"),
    Setting("list", ("CMAP_FROM",), (CMAP,), str, "", "LIST",
            "a file with the names of the inputs, one a line; - for standard input"),
    Setting("block", ("CMAP_BLOCK",), (CMAP,), parse_size, "", "SIZE",
            "cut standard input into blocks of so many bytes (k, M, G), behind the last line end that fits"),
    Setting("cut", ("CMAP_CUT",), (CMAP,), one_of("lines", "bytes"), "lines", "lines|bytes",
            "where --block cuts: bytes for exactly at its size"),
    Setting("value", ("CMAP_VALUE",), (CMAP,), str, "", "NAME",
            "each line is the VALUE of NAME=VALUE for one job, whose input is empty"),
    Setting("names", ("CMAP_SET",), (CMAP,), str, "", "NAME=VALUE",
            "a parameter for each job; replacement strings hold; several times for several"),
    Setting("out", ("CMAP_OUT",), (CMAP,), str, "", "PATTERN",
            "an output file for each job; replacement strings hold (default: all to standard output)"),
    Setting("again", ("CMAP_AGAIN",), (CMAP,), whole_number(0, 1000), "0", "N",
            "how often a job that ended with another status than 0 runs again"),
    Setting("timeout", ("CMAP_TIMEOUT",), (CMAP,), optional(seconds(0, 10 ** 7)), "", "SECONDS",
            "how long each job may run, 0 for ever; its status is then 124"),
    Setting("halt", ("CMAP_HALT",), (CMAP,), one_of("", "soon", "now"), "", "soon|now",
            "on the first failure start no more jobs, or end at once (default: go on)"),
    Setting("log", ("CMAP_LOG",), (CMAP,), str, "", "FILE", "append a line for each job that has ended"),
    Setting("count", ("CMAP_COUNT",), (CMAP,), optional(whole_number(1, 10 ** 9)), "", "COUNT",
            "-N COUNT: so many lines for each job of --lines"),
    Setting("cut_before", ("CMAP_CUT_BEFORE",), (CMAP,), str, "", "TEXT",
            "blocks of standard input begin with a line that begins so; without --block one job for each"),
    Setting("spill", ("CMAP_SPILL",), (CMAP,), parse_spill, "1024", "MIB",
            "how much of outputs may wait for their turn"),
    Setting("replay", ("CEXEC_REPLAY",), (CEXEC,), whole_number(0, 1 << 12), "16", "MIB",
            "how much of an input that is no file is kept in memory for starting again"),
    Setting("ratout_test", ("CEXEC_RATOUT_TEST",), (CEXEC,), switch, "", "0|1",
            "send a test alert after finding a worker"),
    Setting("user", ("CEXEC_USER",), (CEXEC, CMAP), parse_user, "", "USER@HOST",
            "who the job is from, for people to read, or none (default: user and host as they are)"),
    Setting("escape", ("CEXEC_ESCAPE",), (CEXEC,), parse_escape, "~", "CHAR", "the escape character of -t, or none"),
    Setting("concurrency", ("CONCURRENCY",), (CSERVICE,), optional(whole_number(1, 10000)), "", "N",
            "most jobs at once (default: the number of usable CPUs)"),
    Setting("boost", ("BOOST",), (CSERVICE,), optional(whole_number(0, 10 ** 9)), "", "MICROSECONDS",
            "answer after this time, whatever the load is"),
    Setting("user", ("CSERVICE_USER",), (CSERVICE,), optional(str), "", "NAME",
            "when started as root: whose rights the jobs get"),
    Setting("veto", ("CSERVICE_IF",), (CSERVICE,), str, "", "COMMAND",
            "take new jobs only while this shell command ends with 0"),
    Setting("limits", ("CSERVICE_LIMIT",), (CSERVICE,), parse_limits, "", "NAME=VALUE,...",
            "what one job may use: wall and cpu (seconds), memory and file (bytes, k M G), processes"),
    Setting("allow", ("CSERVICE_ALLOW",), (CSERVICE,), parse_allowed, "", "NAME=PATTERN",
            "take only parameters of this NAME whose value matches the shell's PATTERN; may be given several times"),
    Setting("log", ("CSERVICE_LOG",), (CSERVICE,), str, "", "FILE",
            "the file for its lines once it is ready (-d: ~/.local/state/cexec/HOST-APP.log)"),
    Setting("max_skew", ("CRAT_MAX_SKEW",), (CRAT,), seconds(0, 10 ** 9), "900", "SECONDS",
            "how far an alert's clock may differ from this machine's; 0 takes any"),
    Setting("keys", ("CPROXY_KEY",), (CPROXY,), lambda text: list(filter(None, text.split(":"))), "", "APP.pub",
            "carry this key's jobs only; several times for several keys"),
    Setting("idle", ("CPROXY_IDLE",), (CPROXY,), seconds(1, 10 ** 6), "300", "SECONDS",
            "silence after which a relayed connection is ended"),
)

# Settings that are lists: what stands between the values of an option that is given several times.
REPEATABLE = {"keys": ":", "names": "\0", "allow": "\n", "limits": ",", "listen_ports": ",", "accept_server": " ",
              "reject_servers": " "}

SHORT = {"-j": "--jobs", "-N": "--count"}      # short names of options of cmap that have a value

FLAGS = {   # options without a value: {option: (attribute, value, tools, help)}
    "-stdin": ("stdin", True, ("ckeygen",), "derive the key from standard input: the same text, the same key"),
    "-l": ("list", True, ("ckeygen",), "tell which half each FILE is, and the key's fingerprint"),
    "-t": ("terminal", 1, (CEXEC,), "give the job a terminal"),
    "-tt": ("terminal", 2, (CEXEC,), "give the job a terminal even without a local one"),
    "-v": ("verbose", True, (CEXEC,), "tell each step on standard error"),
    "-n": ("no_input", True, (CEXEC,), "standard input is empty: what is there stays for others"),
    "-q": ("quiet", True, (CEXEC, CMAP), "no line that tells what is waited for; cmap: no summary either"),
    "--lines": ("lines", True, (CMAP,), "each line of standard input, or of the FILEs, is one job's input"),
    "--header": ("header", True, (CMAP,), "the first line stands before each job's lines or block"),
    "--tag": ("tag", True, (CMAP,), "put the input's name and a tab before each line of output"),
    "--keep-failed": ("keep_failed", True, (CMAP,), "keep the output of a failed job under its name and .failed"),
    "--dry-run": ("dry_run", True, (CMAP,), "print input and output of each job, and run none"),
    "-0": ("nul", True, (CMAP,), "the names in LIST end with NUL, not with the line"),
    "--unordered": ("unordered", True, (CMAP,), "write outputs as jobs end, not in the order of the inputs"),
    "--hedge": ("hedge", True, (CMAP,), "at the end start the longest-running jobs twice; the first to end counts"),
    "--resume": ("resume", True, (CMAP,), "leave out what the log has with status 0, unless it has changed"),
    "-d": ("background", True, (CSERVICE,), "serve in the background; returns when it is ready"),
    "--stop": ("stop", True, (CSERVICE,), "tell this user's cservices of APP on this machine to stop, and wait for it"),
    "--now": ("now", True, (CSERVICE,), "with --stop: end the running jobs too"),
    "--scratch": ("scratch", True, (CSERVICE,), "an empty folder for each job, removed after it"),
    "--python": ("python", True, (CSERVICE,), "serve calls of Python functions, for cexec.Executor"),
    "--check": ("check", True, (CWHO,), "find out why nobody answers, and what to do"),
    "--watch": ("watch", True, (CWHO,), "show the room every two seconds, and the jobs that end; q ends"),
    "--slots": ("slots", True, (CWHO,), "print only the number of free slots, 1 where none is free"),
    "--jobs": ("running_jobs", True, (CWHO,), "show the jobs that run now: where, whose, for how long"),
    "--json": ("json", True, (CRAT, CWHO), "print one JSON object per line"),
    "--time": ("time", True, (CRAT,), "put date and time in front of each line"),
}


class Settings:
    """What one run of a tool was told, frozen."""

    def __init__(self, values):
        self.__dict__.update(values)

    def __setattr__(self, name, value):
        raise AttributeError("settings are fixed at the start")


SHOWN = ("-h", "--help", "--version")       # options in place of which a tool shows a text and does nothing else
KNOWN_VARIABLES = ("CEXEC_DEBUG", "CEXEC_JOB", "CEXEC_DIR")     # beside the settings: tracebacks; what a job is told


def read_settings(tool, arguments, environment):
    """(Settings, remaining arguments): options first, then the environment, then the defaults.  `given` in them has
    {attribute: NAME=TEXT} of what was no default.  Where a text is to be shown only, they have `shown` alone, one of
    SHOWN."""
    given, flags, rest = _read_options(tool, list(arguments))
    if "shown" in flags:
        return Settings(flags), []
    values = dict({attribute: 0 for attribute, _, _, _ in FLAGS.values()}, given={}, **flags)
    for setting in SETTINGS:
        if tool in setting.tools:
            name, text = given.get(setting.attribute, (None, None))
            for variable in setting.names if text is None else ():
                if text is None and environment.get(variable, "") != "":
                    name, text = variable, environment[variable]
            if text is not None:
                values["given"][setting.attribute] = "%s=%s" % (name, text)
            try:
                if text == "":      # of an option; an empty variable counts as unset
                    raise ValueError("a value that is not empty")
                values[setting.attribute] = setting.parse(setting.default if text is None else text)
            except ValueError as error:
                raise Failure("%s=%s" % (name, text), "not accepted", "accepted: %s" % error, EXIT_USAGE) from None
    return Settings(values), rest


def _read_options(tool, arguments):
    """({attribute: (option as written, its value)}, {attribute of a flag: value}, operands)"""
    options = {option: setting for setting in SETTINGS if tool in setting.tools for option in setting.options}
    own_flags = {flag: entry for flag, entry in FLAGS.items() if tool in entry[2]}
    given, flags = {}, {}
    while arguments and arguments[0].startswith("-") and arguments[0] != "-":
        word = arguments.pop(0)
        if word == "--":
            return given, flags, arguments
        if word in SHOWN:
            return {}, {"shown": word}, []
        word = "-stdin" if word == "--stdin" else word
        if word[:2] in SHORT and tool == CMAP:
            word = SHORT[word[:2]] + ("=" + word[2:].lstrip("=") if word[2:] else "")
        name, equals, value = word.partition("=")
        if word in own_flags:
            flags[own_flags[word][0]] = own_flags[word][1]
        elif name not in options:
            alone = ["-" + letter for letter in word[1:]]
            hint = ("each stands alone: %s; " % " ".join(alone) if len(alone) > 1 and set(alone) <= set(own_flags) else
                    did_you_mean(name, [*options, *own_flags, *SHOWN]))
            raise Failure(word, "unknown option", hint + "see %s --help" % tool, EXIT_USAGE)
        elif not equals and not arguments:
            raise Failure(name, "an option without its value", "see %s --help" % tool, EXIT_USAGE)
        else:
            attribute, value = options[name].attribute, value if equals else arguments.pop(0)
            if attribute in given and attribute in REPEATABLE:
                value = given[attribute][1] + REPEATABLE[attribute] + value
            given[attribute] = name, value
    # What follows the COMMAND of cservice is the command's own.
    for word in arguments[1:2 if tool == CSERVICE else None]:
        if word in own_flags or word.partition("=")[0] in options:
            raise Failure(word, "an option after %s" % arguments[0],
                          "options come first: %s %s ... %s" % (tool, word, arguments[0]), EXIT_USAGE)
    return given, flags, arguments


def did_you_mean(word, known):
    """A question for a hint, with the known words that begin so, else the nearest; empty where there is none."""
    longer = [each for each in known if len(word) > 3 and each.startswith(word)]
    try:
        import difflib
    except ImportError:
        return ""
    near = longer[:3] or difflib.get_close_matches(word, known, 1, 0.75)
    return "did you mean %s? " % " or ".join(near) if near else ""


def shell_word(text):
    """The text as one word of a command that can be pasted."""
    import shlex        # noqa: not at every start
    return shlex.quote(text)


def unknown_variables(environment):
    """A warning for each variable that looks like a setting and is none: a misspelt one must not be silently void."""
    known = {name for setting in SETTINGS for name in setting.names}.union(KNOWN_VARIABLES)
    prefixes = tuple(tool.upper() + "_" for tool in TOOL_NAMES)
    return ["warning: %s is set, and no tool knows it; %sit has no effect" % (name, did_you_mean(name, sorted(known)))
            for name in sorted(environment)
            if name.startswith(prefixes) and name not in known and not name.startswith("CEXEC_TEST_")]


# ---------------------------------------------------------------- wire
#
# Everything that two machines say to each other, each encoder beside its decoder.  A decoder raises ProtocolError for
# what no encoder could have made, and nothing else.  Numbers are big-endian.

WIRE_VERSION = 3            # one number for datagrams, preamble and session: they change together
MAGIC = b"cxec"
TAG_SIZE = 16
U32_MAX = 0xffffffff         # what is measured and greater is sent as this

ANNOUNCE, HOLD, TAKEN, ALERT, ASK, HERE = 1, 2, 3, 4, 5, 6
DATAGRAM_NAMES = {ANNOUNCE: "announce", HOLD: "hold", TAKEN: "taken", ALERT: "alert", ASK: "ask", HERE: "here"}
DATAGRAM_MAX = 1200         # bytes; fits every link's packet, so nothing is ever fragmented

(WELCOME, HELLO, JOB, ACCEPTED, REFUSED, DATA, END, STOP, CREDIT,
 SIGNAL, WINDOW, PING, PONG, EXIT, ABORT, BYE, EMPTIED, OTHERS_WAIT) = range(18)
MESSAGE_NAMES = dict(enumerate(
    "welcome hello job accepted refused data end stop credit signal window ping pong exit abort bye emptied "
    "others-wait".split()))


def tag(secret, *parts):
    """HMAC-SHA256 (RFC 2104) over the parts, cut to 16 bytes: forging one needs 2^128 tries in place."""
    return hmac.digest(secret, b"".join(parts), "sha256")[:TAG_SIZE]


WORDS_MAX = 255             # bytes of what a peer says for people to read, and characters of it that are shown


def pack_words(text, longest=WORDS_MAX):
    """The text (str) as bytes, cut behind the last character that fits into `longest` bytes."""
    return text.encode("utf-8", "replace")[:longest].decode("utf-8", "ignore").encode()


def unpack_words(data):
    """What a peer has said, as people may see it: nothing of it drives a terminal."""
    return printable(data[:WORDS_MAX].decode("utf-8", "replace"))[:WORDS_MAX]


def pack_short_texts(texts, longest=WORDS_MAX):
    """Texts (str), each behind its length in one byte, cut as pack_words does."""
    return b"".join(bytes([len(text)]) + text for text in (pack_words(text, longest) for text in texts))


def unpack_short_texts(data, at, count):
    """(list of `count` texts, each as unpack_words gives it, position behind them) of what pack_short_texts wrote."""
    texts = []
    for _ in range(count):
        size = data[at] if at < len(data) else -1
        if not 0 <= size <= len(data) - at - 1:
            raise ProtocolError("a list of texts cut short")
        texts.append(unpack_words(data[at + 1:at + 1 + size]))
        at += 1 + size
    return texts, at


# Datagrams.
#
# offset  size  field
#      0     4  magic "cxec"
#      4     1  version
#      5     1  type
#      6     2  TCP port to connect back to (announce, ask), else 0: outside the authentication, a proxy rewrites it
#      8     4  key id
#     12     8  nonce: names one search for a worker or one roll call; random
#     20     4  sequence: counts the sender's datagrams of this type and nonce
#     24     n  body, by type
#   24+n    16  tag over all but the port

DATAGRAM_HEAD = struct.Struct(">4sBBH4s8sI")
BODY_MAX = DATAGRAM_MAX - DATAGRAM_HEAD.size - TAG_SIZE


class Datagram(collections.namedtuple("Datagram", "kind port key_id nonce sequence body data")):
    """One datagram, parsed but not yet believed: `authentic` says whether the key's holder made it."""
    __slots__ = ()

    def authentic(self, secret):
        signed, mark = self.data[:-TAG_SIZE], self.data[-TAG_SIZE:]
        return hmac.compare_digest(tag(secret, signed[:6], signed[8:]), mark)


def encode_datagram(secret, kind, key_id, nonce, sequence, body=b"", port=0):
    data = DATAGRAM_HEAD.pack(MAGIC, WIRE_VERSION, kind, port, key_id, nonce, sequence) + body
    return data + tag(secret, data[:6], data[8:])


def parse_datagram(data):
    """The Datagram in these bytes; says nothing about who made it."""
    if not DATAGRAM_HEAD.size + TAG_SIZE <= len(data) <= DATAGRAM_MAX:
        raise ProtocolError("a datagram of %d bytes" % len(data))
    magic, version, kind, port, key_id, nonce, sequence = DATAGRAM_HEAD.unpack_from(data)
    if magic != MAGIC:
        raise ProtocolError("a datagram of another program")
    if version != WIRE_VERSION:
        raise ProtocolError("a datagram of protocol version %d, this program speaks %d" % (version, WIRE_VERSION))
    if kind not in DATAGRAM_NAMES:
        raise ProtocolError("a datagram of unknown type %d" % kind)
    return Datagram(kind, port, key_id, nonce, sequence, data[DATAGRAM_HEAD.size:-TAG_SIZE], data)


def speaks_another_version(data):
    """Whether these bytes are a datagram of this program in another version of the protocol."""
    return data[:4] == MAGIC and data[4:5] not in (b"", bytes([WIRE_VERSION]))


def with_port(data, port):
    """The same datagram with another port to connect back to: all that a proxy may change."""
    return data[:6] + struct.pack(">H", port) + data[8:]


def unpack_body(form, datagram):
    """The body's fields.  A longer body is a later minor version's and read as far as it is known."""
    if len(datagram.body) < form.size:
        raise ProtocolError("a short %s datagram" % DATAGRAM_NAMES[datagram.kind])
    return form.unpack_from(datagram.body)


# Attempt; ms waited so far; ms to the next announcement; flags; submitter; slots wanted.
ANNOUNCE_BODY = struct.Struct(">HIIB8sH")
TELL_BUSY = 1               # flag: whoever has no free slot says so
PROVE = 2                   # flag: and connects all the same, to show that it has the private key
HOLD_BODY = struct.Struct(">H")             # milliseconds
TAKEN_BODY = struct.Struct(">f")            # the new shared offset in milliseconds, NaN for none
ASK_BODY = struct.Struct(">HBH")    # ms over which the answers are to be spread; flags; bytes of the filter behind
CONNECT = 1                 # flag: try to connect back to the port as well
CHECK = 2                   # flag: workers of other keys say that they are there
ASK_JOBS = 4                # flag: tell which jobs run
FILTER_MAX = 1024           # bytes: of a thousand workers one in a hundred waits for the next round


# attempt: counts from 0.  waited, interval: seconds.  submitter: 8 bytes that name the submitting process.
# wanted: how many slots it can use now.
Announcement = collections.namedtuple("Announcement", "attempt waited interval flags submitter wanted")


def to_ms(seconds):
    return round(min(seconds * 1000, U32_MAX))


def encode_announcement(announcement):
    attempt, waited, interval, flags, submitter, wanted = announcement
    return ANNOUNCE_BODY.pack(min(attempt, 65535), to_ms(waited), to_ms(interval), flags, submitter,
                              min(wanted, 65535))


def parse_announcement(datagram):
    attempt, waited, interval, *others, wanted = unpack_body(ANNOUNCE_BODY, datagram)
    if not wanted:
        raise ProtocolError("an announcement that wants no slot")
    return Announcement(attempt, waited / 1000, interval / 1000, *others, wanted)


def encode_hold(seconds):
    return HOLD_BODY.pack(to_ms(seconds))


def parse_hold(datagram):
    return unpack_body(HOLD_BODY, datagram)[0] / 1000


def encode_taken(offset):
    """offset: the shared offset from now on, or None."""
    return TAKEN_BODY.pack(math.nan if offset is None else offset * 1000)


def parse_taken(datagram):
    offset, = unpack_body(TAKEN_BODY, datagram)
    return None if math.isnan(offset) else offset / 1000


def encode_ask(spread, flags, heard=b""):
    """heard: a filter of the workers that need not answer again, as heard_filter makes it."""
    return ASK_BODY.pack(to_ms(spread), flags, len(heard)) + heard


def parse_ask(datagram):
    """(seconds over which to spread the answers, flags, filter)."""
    spread, flags, size = unpack_body(ASK_BODY, datagram)
    heard = datagram.body[ASK_BODY.size:ASK_BODY.size + size]
    if len(heard) < size:
        raise ProtocolError("a short ask datagram")
    return spread / 1000, flags, heard


def filter_bits(size, nonce, sequence, instance):
    """The four bits of a filter of `size` bytes that stand for a worker, others in each datagram."""
    digest = hashlib.sha256(struct.pack(">8sI", nonce, sequence) + instance.encode()).digest()
    return [number % (8 * size) for number in struct.unpack(">4I", digest[:16])]


def heard_filter(nonce, sequence, instances):
    """A Bloom filter: it has all of these instances, and of others few."""
    bits = bytearray(min(FILTER_MAX, 2 * len(instances)))
    for instance in instances:
        for bit in filter_bits(len(bits), nonce, sequence, instance):
            bits[bit >> 3] |= 1 << (bit & 7)
    return bytes(bits)


def is_heard(heard, nonce, sequence, instance):
    return bool(heard) and all(heard[bit >> 3] >> (bit & 7) & 1
                               for bit in filter_bits(len(heard), nonce, sequence, instance))


# An alert datagram's body is one or more alerts, one behind the other.
COMPLETED, RATTED_OUT = 1, 2
ALERT_BODY = struct.Struct(">BBIQ")     # verdict; exit status; milliseconds the job took; UNIX time in milliseconds
ALERT_TEXTS = 4


# What cexec reports about a worker.  Texts are str; addresses are numeric, without port.
Alert = collections.namedtuple("Alert", "verdict status milliseconds clock job submitter worker words")


def encode_alert(alert):
    verdict, status, milliseconds, clock, *texts = alert
    return ALERT_BODY.pack(verdict, status, min(milliseconds, U32_MAX), clock) + pack_short_texts(texts)


def pack_alerts(entries):
    """[body of one datagram, ...] that hold these encoded alerts in order, as many in each as fit."""
    bodies = []
    for entry in entries:
        if not bodies or len(bodies[-1]) + len(entry) > BODY_MAX:
            bodies.append(b"")
        bodies[-1] += entry
    return bodies


def parse_alerts(datagram):
    """[Alert, ...] in an alert datagram; ProtocolError when one is cut short or of an unknown kind."""
    alerts, at, body = [], 0, datagram.body
    while at < len(body) or not alerts:
        if len(body) - at < ALERT_BODY.size:
            raise ProtocolError("a short alert datagram")
        fields = ALERT_BODY.unpack_from(body, at)
        if fields[0] not in (COMPLETED, RATTED_OUT):
            raise ProtocolError("an alert of unknown kind %d" % fields[0])
        texts, at = unpack_short_texts(body, at + ALERT_BODY.size, ALERT_TEXTS)
        alerts.append(Alert(*fields, *texts))
    return alerts


FREE, BUSY, DRAINING, VETOED, UNREACHABLE, UNABLE = range(6)
STATE_NAMES = {FREE: "free", BUSY: "busy", DRAINING: "draining", VETOED: "vetoed", UNREACHABLE: "cannot connect",
               UNABLE: "cannot run"}
# State; slots, running, waiting, CPUs; load, cost, speed; seconds up, jobs done; port it tried to connect to.
HERE_BODY = struct.Struct(">BHHHHfffIIH")
HERE_TEXTS = 9
HERE_TEXT_MAX = 115         # bytes of one of them: all nine fit a datagram at their longest
HERE_JOBS = struct.Struct(">BH")        # how many jobs follow; how many there was no room for
HERE_JOB = struct.Struct(">I")          # seconds that a job has run; its texts follow


# id: as in Job.  submitter: address.  user: USER@HOST as it says itself.
RunningNow = collections.namedtuple("RunningNow", "seconds id submitter user")


class Here(collections.namedtuple(
        "Here", "state slots running waiting cpus load cost speed up done port "
                "address instance host version python digest command error back jobs more")):
    """A worker's answer to a roll call, or to an announcement that it cannot serve now.

    state: FREE ... UNABLE.  waiting: submitters it knows of.  load: processes that other work wants to run.
    cost: as in the preamble.  speed: of one CPU, 1.0 is usual.  back, port: the address where it has tried to connect
    back, "" and 0 if it has not.  error: why it could not do that, or why it serves nobody.  digest: of the command's
    basename and arguments.
    jobs: a tuple of RunningNow, where they were asked for; more: how many did not fit.
    """
    __slots__ = ()

    def text(self):
        """The state in words for a user."""
        if self.state == UNREACHABLE:
            return "could not connect back to %s: %s" % (address_text((self.back, self.port)), self.error)
        return STATE_NAMES[self.state] + (": " + self.error if self.error else "")


def encode_here(here):
    """As many of the jobs go along as fit; the rest is counted."""
    short = [min(number, 65535) for number in here[1:5]]
    body = HERE_BODY.pack(here.state, *short, here.load, here.cost, here.speed, int(min(here.up, U32_MAX)),
                          min(here.done, U32_MAX), here.port) + pack_short_texts(here[11:11 + HERE_TEXTS],
                                                                                 HERE_TEXT_MAX)
    jobs, count = b"", 0
    for job in here.jobs[:255]:
        entry = HERE_JOB.pack(int(min(job.seconds, U32_MAX))) + pack_short_texts(job[1:], HERE_TEXT_MAX)
        if len(body) + HERE_JOBS.size + len(jobs) + len(entry) > BODY_MAX:
            break
        jobs, count = jobs + entry, count + 1
    return body + HERE_JOBS.pack(count, min(len(here.jobs) - count + here.more, 65535)) + jobs


def parse_here(datagram):
    fields = unpack_body(HERE_BODY, datagram)
    if fields[0] not in STATE_NAMES:
        raise ProtocolError("a worker in unknown state %d" % fields[0])
    if not all(map(math.isfinite, fields[5:8])):
        raise ProtocolError("a worker whose load is no number")
    texts, at = unpack_short_texts(datagram.body, HERE_BODY.size, HERE_TEXTS)
    if len(datagram.body) - at < HERE_JOBS.size:
        raise ProtocolError("a short here datagram")
    (count, more), at, jobs = HERE_JOBS.unpack_from(datagram.body, at), at + HERE_JOBS.size, []
    for _ in range(count):
        if len(datagram.body) - at < HERE_JOB.size:
            raise ProtocolError("a short here datagram")
        seconds, = HERE_JOB.unpack_from(datagram.body, at)
        job, at = unpack_short_texts(datagram.body, at + HERE_JOB.size, 3)
        jobs.append(RunningNow(seconds, *job))
    return Here(*fields, *texts, tuple(jobs), more)


# The preamble, the first bytes of a worker's connection, in plain: it lets cexec rank the candidates before any of
# them has cost it a handshake.  The answer is GO, a tag over the very preamble: whoever cannot say it gets no process.
PREAMBLE = struct.Struct(">4sB8sfff?8s")    # magic, version, nonce, cost, offset and wait (ms), from a queue, random
PREAMBLE_SIZE = PREAMBLE.size + TAG_SIZE
GO_SIZE = TAG_SIZE


# What a worker says when it connects.  waited: seconds, 0 where the wait says nothing about the offset.
# queued: whether it had no free slot when its time came.
Answer = collections.namedtuple("Answer", "nonce cost offset waited queued")


def encode_preamble(secret, answer, random):
    """random: 8 bytes, new for each connection."""
    nonce, cost, offset, waited, queued = answer
    data = PREAMBLE.pack(MAGIC, WIRE_VERSION, nonce, cost, 1000 * offset, 1000 * waited, queued, random)
    return data + tag(secret, b"preamble", data)


def preamble_may_follow(data, nonce=b""):
    """Whether these first bytes of a connection can be the beginning of a preamble for this nonce."""
    expected = MAGIC + bytes([WIRE_VERSION]) + nonce
    return data[:len(expected)] == expected[:len(data)]


def parse_preamble(secret, nonce, data):
    """(Answer, random) of a worker's opening bytes; ProtocolError for a stranger's."""
    data = bytes(data)
    if len(data) != PREAMBLE_SIZE or data[:4] != MAGIC:
        raise ProtocolError("not a worker")
    if data[4] != WIRE_VERSION:
        raise ProtocolError("a worker of protocol version %d, this program speaks %d" % (data[4], WIRE_VERSION))
    if not hmac.compare_digest(tag(secret, b"preamble", data[:-TAG_SIZE]), data[-TAG_SIZE:]):
        raise ProtocolError("a worker of another key")
    _, _, answered, cost, offset, waited, queued, random = PREAMBLE.unpack_from(data)
    if answered != nonce:
        raise ProtocolError("a worker that answers another announcement")
    return Answer(nonce, cost, offset / 1000, waited / 1000, queued), random


def encode_go(secret, preamble, wanted=True):
    """The answer to a preamble; not wanted: this search will never take that worker."""
    return tag(secret, b"go" if wanted else b"no", preamble)


# Over TLS both sides send messages: type (1 byte), 0 (1), descriptor or number (2), length (4), then so many bytes.

FRAME_HEAD = struct.Struct(">BBHI")
HEAD_SIZE = FRAME_HEAD.size


def frame(kind, number=0, body=b""):
    return FRAME_HEAD.pack(kind, 0, number, len(body)) + body


class FrameReader:
    """Cuts a stream of bytes into messages.  Data comes out as it arrives, in views of the caller's buffer;
    every other message comes out whole, as bytes."""

    def __init__(self):
        self.head, self.body = bytearray(), bytearray()
        self.kind, self.number, self.left = None, 0, 0      # of the message that is under way

    def read(self, data):
        """Yields (type, number, body, bytes announced): for data one or more parts, and the size only with the first
        (an empty part of data opens each message)."""
        view = memoryview(data)
        while True:
            if self.kind is None:
                part = view[:HEAD_SIZE - len(self.head)]
                view = view[len(part):]
                self.head += part
                if len(self.head) < HEAD_SIZE:
                    return
                kind, zero, self.number, self.left = FRAME_HEAD.unpack(self.head)
                self.head.clear()
                if kind not in MESSAGE_NAMES or zero:
                    raise ProtocolError("a message of unknown type %d" % kind)
                if self.left > (FRAME_MAX if kind == DATA else CONTROL_MAX):
                    raise ProtocolError("a %s message of %d bytes" % (MESSAGE_NAMES[kind], self.left))
                self.kind = kind
                if kind == DATA:
                    yield DATA, self.number, b"", self.left
            part = view[:self.left]
            view = view[len(part):]
            self.left -= len(part)
            if self.kind == DATA:
                if part:
                    yield DATA, self.number, part, 0
            else:
                self.body += part
            if self.left:
                return
            if self.kind != DATA:
                yield self.kind, self.number, bytes(self.body), 0
                self.body.clear()
            self.kind = None


def pack_texts(texts):
    """Texts (bytes), each behind its length in 4 bytes."""
    return b"".join(struct.pack(">I", len(text)) + text for text in texts)


def unpack_texts(data):
    """What pack_texts packed; ProtocolError when the lengths do not add up."""
    texts, at = [], 0
    while at < len(data):
        size = struct.unpack_from(">I", data, at)[0] if len(data) - at >= 4 else len(data)
        at += 4
        if size > len(data) - at:
            raise ProtocolError("a list cut short")
        texts.append(bytes(data[at:at + size]))
        at += size
    return texts


def encode_greeting(address, *more):
    """What each side says first: its address on the network it speaks from; a worker also which run of cservice it is,
    and what it can do."""
    return pack_texts([b"%d" % WIRE_VERSION, *(text.encode() for text in (address, *more))])


def parse_welcome(body):
    """The submitter's address, as it says it, without a scope."""
    texts = unpack_texts(body)
    address = parse_address(texts[1].decode("ascii", "replace")) if len(texts) > 1 else None
    if not address or address[2]:
        raise ProtocolError("a greeting without an address")
    return address[0]


def encode_hello(address, instance, sees_reading, host=""):
    """sees_reading: whether the worker can tell when a job begins to read an input.  host: its machine's name."""
    return encode_greeting(address, instance, "reading" if sees_reading else "", host[:HERE_TEXT_MAX])


def parse_hello(body):
    """(address, instance, whether it can tell when a job begins to read an input, name of its machine) of a worker."""
    more = unpack_texts(body)[2:5]
    if len(more) < 3:
        raise ProtocolError("a hello cut short")
    return parse_welcome(body), unpack_words(more[0]), b"reading" in more[1].split(), unpack_words(more[2])


# What a job does with a descriptor: reads, writes, both; it is the terminal; it shares another one.
IN, OUT, BOTH, TTY, ALIAS = b"r", b"w", b"b", b"t", b"="
UPWARD, DOWNWARD = (IN, BOTH, TTY), (OUT, BOTH, TTY)
SIGNALS = ("INT", "TERM", "HUP", "QUIT", "USR1", "USR2", "TSTP", "CONT")    # position = number on the wire


USER_MAX = 64               # bytes of what a submitter says of itself


class Job(collections.namedtuple("Job", "id descriptors names timeout terminal copied user",
                                 defaults=(frozenset(), ""))):
    """What the submitter asks for.

    id: 16 hexadecimal digits.  descriptors: {number: IN, OUT, BOTH, TTY, or the lower number it shares}.
    names: [(name, value)] as bytes.  timeout: seconds of silence that mean loss.
    terminal: None, or what the TTY is: (rows, columns, type, {mode: number}), type and modes as bytes.
    copied: a frozenset of the inputs of which only a copy is sent until the job has read all of it.
    user: USER@HOST, for people to read and never for a decision.
    """
    __slots__ = ()


def encode_job(job):
    descriptors = ["%d%s" % (fd, kind.decode()) if isinstance(kind, bytes) else "%d=%d" % (fd, kind)
                   for fd, kind in sorted(job.descriptors.items())]
    terminal = []
    if job.terminal:
        rows, columns, name, modes = job.terminal
        terminal = [b"%d" % rows, b"%d" % columns, name, b" ".join(b"%s=%d" % mode for mode in sorted(modes.items()))]
    return pack_texts([job.id.encode(), " ".join(descriptors).encode(), b"%d" % round(job.timeout * 1000),
                       pack_texts(terminal), pack_texts([name + b"=" + value for name, value in job.names]),
                       " ".join(map(str, sorted(job.copied))).encode(),
                       job.user.encode("utf-8", "replace")[:USER_MAX]])


def parse_job(data):
    texts = unpack_texts(data)
    if len(texts) < 7:
        raise ProtocolError("a job cut short")
    identity, descriptors, timeout, terminal, names, copied, user = texts[:7]
    if len(identity) != 16 or identity.strip(b"0123456789abcdef"):
        raise ProtocolError("a job without a proper id")
    names = unpack_texts(names)
    pairs = [text.partition(b"=")[::2] for text in names]
    for text, (name, value) in zip(names, pairs):
        if b"=" not in text or not is_name(name) or b"\0" in value:
            raise ProtocolError("a job with an improper NAME=VALUE")
    terminal = _parse_terminal(unpack_texts(terminal))
    descriptors = _parse_descriptors(descriptors, terminal)
    copied = frozenset(_whole(number, 0, DESCRIPTOR_MAX) for number in copied.split())
    if not all(descriptors.get(number) in (IN, BOTH) for number in copied):
        raise ProtocolError("a copy of what is no input")
    return Job(identity.decode(), descriptors, pairs, _whole(timeout, 1, 86400000) / 1000, terminal, copied,
               unpack_words(user[:USER_MAX]))


def is_name(name):
    """Whether these bytes are an environment variable's name as POSIX shells take it."""
    return name.isascii() and name.decode().isidentifier()


def _whole(text, low, high):
    if not text.isdigit() or len(text) > 10 or not low <= int(text) <= high:
        raise ProtocolError("the number %s where %d to %d belong" % (printable(text[:20]), low, high))
    return int(text)


def _parse_descriptors(text, terminal):
    result, has_terminal = {}, False
    for entry in text.split():
        number, kind = entry[:-1], entry[-1:]
        if kind in (IN, OUT, BOTH) or (kind == TTY and terminal and not has_terminal):
            fd = _whole(number, 0, DESCRIPTOR_MAX)
            has_terminal = has_terminal or kind == TTY
        else:
            number, _, shared = entry.partition(ALIAS)
            fd, kind = _whole(number, 0, DESCRIPTOR_MAX), _whole(shared, 0, DESCRIPTOR_MAX)
            if not isinstance(result.get(kind), bytes):
                raise ProtocolError("descriptor %d shares one that is not there" % fd)
        if fd in result:
            raise ProtocolError("descriptor %d twice" % fd)
        result[fd] = kind
    return result


def _parse_terminal(texts):
    if not texts:
        return None
    if len(texts) != 4:
        raise ProtocolError("a terminal cut short")
    rows, columns, name, modes = texts
    if b"\0" in name or len(name) > 64:
        raise ProtocolError("a terminal of an improper type")
    pairs = [mode.partition(b"=")[::2] for mode in modes.split()]
    return (_whole(rows, 0, 65535), _whole(columns, 0, 65535), name,
            {mode: _whole(value, 0, 255) for mode, value in pairs})


COUNT = struct.Struct(">Q")             # bytes of an input that the job has read, in a worker's stop
UNKNOWN = 0xffffffffffffffff            # the worker cannot tell
EXIT_BODY = struct.Struct(">BBHI")       # 1 if a signal ended it; 1 if last; status or signal; milliseconds
EXIT_COUNT = struct.Struct(">HQ")       # input, bytes of it that the job has read
SIGNAL_NAMES = {number.name[3:]: number for number in signal.Signals}


class ExitReport(collections.namedtuple("ExitReport", "signalled last number milliseconds name reason consumed")):
    """How a job ended.

    last: whether the worker takes no more jobs on this connection.  number: the status, or the signal's number there.
    name: the signal's, for systems that number them otherwise.  reason: why the worker ended it, as "its limit of
    wall"; "" where it did not.
    consumed: {descriptor: bytes of that input that the job has read, or UNKNOWN}.
    """
    __slots__ = ()

    @property
    def status(self):
        """What a shell would report: the exit status, or 128 and the signal."""
        return 128 + SIGNAL_NAMES.get(self.name, self.number) if self.signalled else self.number


def encode_exit(report):
    return (EXIT_BODY.pack(report.signalled, report.last, report.number, min(report.milliseconds, U32_MAX))
            + pack_short_texts([report.name, report.reason])
            + b"".join(EXIT_COUNT.pack(*item) for item in report.consumed.items()))


def parse_exit(data):
    if len(data) < EXIT_BODY.size:
        raise ProtocolError("an exit message cut short")
    signalled, last, number, milliseconds = EXIT_BODY.unpack_from(data)
    if max(signalled, last) > 1 or not signalled <= number <= (127 if signalled else 255):
        raise ProtocolError("an exit message of a status that does not exist")
    (name, reason), at = unpack_short_texts(data, EXIT_BODY.size, 2)
    count, rest = divmod(len(data) - at, EXIT_COUNT.size)
    consumed = dict(EXIT_COUNT.iter_unpack(data[at:len(data) - rest]))
    if rest or len(consumed) < count or max(consumed, default=0) > DESCRIPTOR_MAX:
        raise ProtocolError("an exit message with improper counts")
    return ExitReport(bool(signalled), bool(last), number, milliseconds, name, reason, consumed)


class EscapeFilter:
    """What a user types, on its way to the job: commands to cexec stand behind the escape character, which counts
    only at the beginning of a line."""
    COMMANDS = {b".": "end", b"\x1a": "suspend"}

    def __init__(self, character):
        self.character = character
        self.fresh = True
        self.held = False

    def filter(self, data):
        """(bytes for the job, commands)."""
        if not self.character:
            return data, []
        result, commands = bytearray(), []
        for byte in (data[i:i + 1] for i in range(len(data))):
            if self.held:
                self.held = False
                if byte in self.COMMANDS:
                    commands.append(self.COMMANDS[byte])
                    continue
                if byte != self.character:
                    result += self.character
            elif self.fresh and byte == self.character:
                self.held = True
                continue
            result += byte
            self.fresh = byte in (b"\r", b"\n")
        return bytes(result), commands


# ---------------------------------------------------------------- keys
# One key is two P-256 identities, the worker's and the client's. All of it follows from 32 bytes, by rules without
# chance (RFC 5869, RFC 6979), so that the same 32 bytes give the same files on every machine. A checksum at the end of
# each file finds every damage, so loading one, at each start of a tool, takes no arithmetic on the curve.
#
# Limit: Python's integers do not work in constant time. A program that can time ckeygen or the start of a tool on
# the same machine might learn about a key; nobody on the network can, because OpenSSL does every handshake.

WORKER_ROLE, CLIENT_ROLE = b"ckey v1 worker", b"ckey v1 client"       # the certificates' names, and HKDF's purposes
UDP_LABEL = b"ckey v1 udp"
SCRYPT_SALT = b"ckey v1"
SCRYPT_COST = 1 << 17       # 128 MiB and about half a second for each guess at a phrase
SCRYPT_MEMORY = 1 << 28     # OpenSSL's own limit, 32 MiB, refuses that cost
PHRASE_START = 1 << 16      # the part of a text that is judged; a program shows its variety long before
PHRASE_BYTES = 16           # characters that are not white space: four short words and more
PHRASE_KINDS = 8            # different ones among them: "aaaa..." and "123123..." are guessed at once
PHRASE_PIECES = 9           # what a guesser has to put together, see guess_pieces()
PHRASE_JUDGED = 1 << 12     # characters that are looked through for pieces
PIECE_LEAST = 4             # characters of one: shorter ones any sentence has
GUESSED = " ".join(row + " " + row[::-1] for row in (   # runs and keyboards' rows, both ways; then common words
    "abcdefghijklmnopqrstuvwxyz 01234567890 qwertyuiop qwertzuiop azertyuiop asdfghjkl qsdfghjklm zxcvbnm yxcvbnm "
    "wxcvbn !@#$%^&*() 1q2w3e4r5t6y7u8i9o0p 1qaz2wsx3edc4rfv5tgb6yhn7ujm8ik 1a2b3c4d5e6f7g8h9i qazwsxedcrfvtgbyhnujm "
    "1qay2wsx3edc4rfv").split()) + (
    " password passwort passphrase secret geheim welcome willkommen letmein iloveyou hello world admin administrator "
    "root login user guest test testing changeme default master monkey dragon football baseball sunshine princess "
    "shadow superman batman trustno access server cluster computer network internet school student teacher university "
    "classroom laboratory january february march april june july august september october november december monday "
    "tuesday wednesday thursday friday saturday sunday summer winter spring autumn cexec ckeygen example sample")
LEET = str.maketrans("013457@$", "oleastas")   # digits that stand for letters
KEY_FILE_LIMIT = 8192       # a private half has about 1,540 bytes; more is some other file

PRIVATE_LABELS = (b"PRIVATE KEY", b"CERTIFICATE", b"CKEY CLIENT KEY", b"CKEY CLIENT CERT", b"CKEY CHECKSUM")
PUBLIC_LABELS = (b"PRIVATE KEY", b"CERTIFICATE", b"CKEY WORKER CERT", b"CKEY CHECKSUM")

# The curve y^2 = x^3 - 3x + b modulo p, with its base point and the (prime) number of points, n.
P256_P = 0xffffffff00000001000000000000000000000000ffffffffffffffffffffffff
P256_N = 0xffffffff00000000ffffffffffffffffbce6faada7179e84f3b9cac2fc632551
P256_B = 0x5ac635d8aa3a93e7b3ebbd55769886bc651d06b0cc53b0f63bce3c3e27d2604b
P256_G = (0x6b17d1f2e12c4247f8bce6e563a440f277037d812deb33a0f4a13945d898c296,
          0x4fe342e2fe1a7f9b8ee7eb4a7c0f9e162bce33576b315ececbb6406837bf51f5)


def hkdf(secret, info, length, salt=b""):
    """LENGTH bytes (up to 8160) derived from SECRET for the purpose INFO: HKDF-SHA256 of RFC 5869."""
    extracted = hmac.digest(salt or bytes(32), secret, "sha256")
    output = block = b""
    for counter in range(1, (length + 31) // 32 + 1):
        block = hmac.digest(extracted, block + info + bytes([counter]), "sha256")
        output += block
    return output[:length]


# P-256: points are (X, Y, Z) with x = X/Z and y = Y/Z; (0, 1, 0) is the neutral one.

def point_add(a, b):
    """The sum of two points: the complete formulas of Renes, Costello and Batina (2016), which know no special case."""
    (x1, y1, z1), (x2, y2, z2), p = a, b, P256_P
    xx, yy, zz = x1 * x2 % p, y1 * y2 % p, z1 * z2 % p
    xy, xz, yz = (x1 * y2 + x2 * y1) % p, (x1 * z2 + x2 * z1) % p, (y1 * z2 + y2 * z1) % p
    slope = 3 * (xx - zz)
    shift = 3 * (P256_B * zz - xz) % p
    cross = 3 * (P256_B * xz - xx - 3 * zz) % p
    return ((xy * (yy - shift) - yz * cross) % p,
            (slope * cross + (yy + shift) * (yy - shift)) % p,
            (yz * (yy + shift) + xy * slope) % p)


@functools.lru_cache(None)
def base_powers():
    """The base point times 16^0 ... 16^63; about a millisecond of work."""
    powers = [P256_G + (1,)]
    for _ in range(4 * 63):
        powers.append(point_add(powers[-1], powers[-1]))
    return powers[::4]


def base_times(scalar):
    """(x, y) of SCALAR (1 to n-1) times the base point.

    The powers are put into 15 heaps by their digit of SCALAR; going down from 15, each heap's running sum is added
    once more, so heap d counts d times: some 75 additions in all, and no doubling.
    """
    heaps = [[] for _ in range(16)]
    for place, power in enumerate(base_powers()):
        heaps[scalar >> 4 * place & 15].append(power)
    total = running = (0, 1, 0)
    for heap in heaps[:0:-1]:
        for power in heap:
            running = point_add(running, power)
        total = point_add(total, running)
    inverse = pow(total[2], -1, P256_P)
    return total[0] * inverse % P256_P, total[1] * inverse % P256_P


def ecdsa_nonces(scalar, digest):
    """The candidates for k of RFC 6979 with SHA-256, in order; all but the first are for one case in 2^32."""
    seed = scalar.to_bytes(32, "big") + (int.from_bytes(digest, "big") % P256_N).to_bytes(32, "big")
    key, value = bytes(32), b"\x01" * 32
    for separator in (b"\x00", b"\x01"):
        key = hmac.digest(key, value + separator + seed, "sha256")
        value = hmac.digest(key, value, "sha256")
    while True:
        value = hmac.digest(key, value, "sha256")
        if 0 < int.from_bytes(value, "big") < P256_N:
            yield int.from_bytes(value, "big")
        key = hmac.digest(key, value + b"\x00", "sha256")
        value = hmac.digest(key, value, "sha256")


def ecdsa_sign(scalar, message):
    """(r, s), the one deterministic ECDSA signature of MESSAGE with SHA-256."""
    digest = hashlib.sha256(message).digest()
    for nonce in ecdsa_nonces(scalar, digest):
        r = base_times(nonce)[0] % P256_N
        s = pow(nonce, -1, P256_N) * (int.from_bytes(digest, "big") + r * scalar) % P256_N
        if r and s:
            return r, s


# DER is only written here: OpenSSL reads it.

DER_INTEGER, DER_BITS, DER_BYTES, DER_OBJECT, DER_TEXT = 0x02, 0x03, 0x04, 0x06, 0x0c
DER_SEQUENCE, DER_SET = 0x30, 0x31


def der(tag, *contents):
    """One DER value: tag, shortest length (below 64 KiB), contents joined."""
    content = b"".join(contents)
    size = len(content)
    count = (size > 0x7f) + (size > 0xff)       # of bytes after the first one of the length
    return bytes([tag] + [0x80 + count] * (count > 0)) + size.to_bytes(count or 1, "big") + content


def der_integer(number):
    """A non-negative INTEGER."""
    return der(DER_INTEGER, number.to_bytes(number.bit_length() // 8 + 1, "big"))


def pem_text(labels, blocks):
    """The PEM text of these blocks (bytes) under these labels."""
    lines = []
    for label, block in zip(labels, blocks):
        lines.append(b"-----BEGIN " + label + b"-----\n")
        lines.extend(binascii.b2a_base64(block[at:at + 48]) for at in range(0, len(block), 48))
        lines.append(b"-----END " + label + b"-----\n")
    return b"".join(lines)


def key_text(labels, blocks):
    """A key file: the DER blocks, and the SHA-256 of the text so far as the last block."""
    text = pem_text(labels, blocks)
    return text + pem_text(labels[-1:], [hashlib.sha256(text).digest()])


def key_blocks(text):
    """(labels, DER blocks) of a key file; ProtocolError, which says why, unless key_text() wrote every byte of it."""
    if len(text) > KEY_FILE_LIMIT:
        raise ProtocolError("it is too large")
    if b"-----BEGIN OPENSSH" in text or text.startswith((b"ssh-", b"ecdsa-")):
        raise ProtocolError("it is a key of ssh, which has its own")
    if b"-----BEGIN " not in text:
        raise ProtocolError("it holds no key at all")
    if b"\r" in text:
        raise ProtocolError("its lines end in CR LF: a copy by way of Windows, or as text, has changed it")
    labels = tuple(part.partition(b"-----\n")[0] for part in text.split(b"-----BEGIN ")[1:])
    if labels not in (PRIVATE_LABELS, PUBLIC_LABELS):
        short = labels in (PRIVATE_LABELS[:len(labels)], PUBLIC_LABELS[:len(labels)])
        raise ProtocolError("its end is missing" if short else "it holds something else")
    head, mark, checksum = text.rpartition(b"-----BEGIN " + labels[-1])
    if mark + checksum != pem_text(labels[-1:], [hashlib.sha256(head).digest()]):
        raise ProtocolError("it is damaged: its checksum does not fit")
    try:
        return labels, [binascii.a2b_base64(part.partition(b"-----\n")[2].partition(b"-----END ")[0])
                        for part in head.split(b"-----BEGIN ")[1:]]
    except ValueError:
        raise ProtocolError("its base64 is no base64") from None


# Private keys (PKCS#8, RFC 5958 and 5915) and certificates (X.509 v3, RFC 5280).

OID_COMMON_NAME = der(DER_OBJECT, b"\x55\x04\x03")
OID_KEY_USAGE = der(DER_OBJECT, b"\x55\x1d\x0f")
OID_BASIC_CONSTRAINTS = der(DER_OBJECT, b"\x55\x1d\x13")
KEY_ALGORITHM = der(DER_SEQUENCE, der(DER_OBJECT, b"\x2a\x86\x48\xce\x3d\x02\x01"),           # ecPublicKey
                    der(DER_OBJECT, b"\x2a\x86\x48\xce\x3d\x03\x01\x07"))                     # prime256v1
SIGNATURE_ALGORITHM = der(DER_SEQUENCE, der(DER_OBJECT, b"\x2a\x86\x48\xce\x3d\x04\x03\x02"))  # ecdsa-with-SHA256
DER_TRUE = der(0x01, b"\xff")
# No certificate may be issued under one of ours (CA:FALSE, an empty sequence), and it may only sign (digitalSignature).
EXTENSIONS = der(0xa3, der(DER_SEQUENCE,
                           der(DER_SEQUENCE, OID_BASIC_CONSTRAINTS, DER_TRUE, der(DER_BYTES, der(DER_SEQUENCE))),
                           der(DER_SEQUENCE, OID_KEY_USAGE, DER_TRUE, der(DER_BYTES, der(DER_BITS, b"\x07\x80")))))
VALIDITY = der(DER_SEQUENCE, der(0x17, b"700101000000Z"), der(0x18, b"99991231235959Z"))      # clocks may be wrong


def private_block(scalar, point):
    """The PKCS#8 block of a private key, public part included."""
    key = der(DER_SEQUENCE, der_integer(1), der(DER_BYTES, scalar.to_bytes(32, "big")),
              der(0xa1, der(DER_BITS, b"\x00", point)))
    return der(DER_SEQUENCE, der_integer(0), KEY_ALGORITHM, der(DER_BYTES, key))


def certificate_body(role, point):
    """The part of a certificate that is signed."""
    serial = int.from_bytes(hashlib.sha256(point).digest()[:16], "big") >> 2 | 1 << 126       # 16 bytes, above zero
    name = der(DER_SEQUENCE, der(DER_SET, der(DER_SEQUENCE, OID_COMMON_NAME, der(DER_TEXT, role))))
    return der(DER_SEQUENCE, der(0xa0, der_integer(2)), der_integer(serial), SIGNATURE_ALGORITHM, name, VALIDITY, name,
               der(DER_SEQUENCE, KEY_ALGORITHM, der(DER_BITS, b"\x00", point)), EXTENSIONS)


def certificate(role, point, signature):
    """The self-signed certificate of ROLE for the public key POINT; SIGNATURE is (r, s) over its body."""
    return der(DER_SEQUENCE, certificate_body(role, point), SIGNATURE_ALGORITHM,
               der(DER_BITS, b"\x00", der(DER_SEQUENCE, *map(der_integer, signature))))


# The two halves.

def identity(role, scalar):
    """[private key, certificate] of one role, as DER."""
    point = b"\x04" + b"".join(number.to_bytes(32, "big") for number in base_times(scalar))     # uncompressed
    return [private_block(scalar, point), certificate(role, point, ecdsa_sign(scalar, certificate_body(role, point)))]


def make_keypair(master):
    """(private half, submitting half) as the bytes of their files, from 32 secret bytes."""
    scalars = [1 + int.from_bytes(hkdf(master, role, 48), "big") % (P256_N - 1) for role in (WORKER_ROLE, CLIENT_ROLE)]
    private = key_text(PRIVATE_LABELS, identity(WORKER_ROLE, scalars[0]) + identity(CLIENT_ROLE, scalars[1]))
    return private, public_half(private)


def public_half(private):
    """The bytes of APP.pub from those of a valid APP: the client's two blocks and the worker's certificate."""
    _, (_, worker_certificate, *client) = key_blocks(private)
    return key_text(PUBLIC_LABELS, client + [worker_certificate])


def guess_pieces(text, enough):
    """How many pieces a guesser has to put together for this text: a run, a part of a keyboard's row, a common word and
    what has come before are one each, like any other character.  It counts no further than `enough`."""
    text, at, pieces = text.lower(), 0, 0
    plain = text.translate(LEET)
    while at < len(text) and pieces < enough:
        size = len(text) - at
        while size >= PIECE_LEAST and not (text[at:at + size] in GUESSED or plain[at:at + size] in GUESSED
                                           or text.find(text[at:at + size], 0, at + size - 1) >= 0):
            size -= 1
        at += size if size >= PIECE_LEAST else 1
        pieces += 1
    return pieces


def refuse_weak(start):
    """Failure when a text that begins so is easy to guess.  The salt is the same everywhere and a key's id travels in
    clear: one list of guesses serves against every room."""
    marks = b"".join(start.split())
    hint = "use six random words and more, drawn by dice, or a program"
    if len(marks) < PHRASE_BYTES or len(set(marks)) < PHRASE_KINDS:
        raise Failure("the text is too easy to guess",
                      "it needs %d characters besides white space, %d of them different" % (PHRASE_BYTES, PHRASE_KINDS),
                      hint, EXIT_USAGE)
    if guess_pieces(marks[:PHRASE_JUDGED].decode("latin-1"), PHRASE_PIECES) < PHRASE_PIECES:
        raise Failure("the text is too easy to guess", "it is made of runs, keyboard rows, common or repeated words",
                      hint, EXIT_USAGE)


def master_from_pieces(pieces, new=True):
    """The 32 secret bytes that a text stands for, a phrase or a program; Failure for a new key when it is too easy to
    guess.  The text comes in pieces and may have any size: what scrypt gets is its SHA-512."""
    digest, start = hashlib.sha512(), b""
    for piece in pieces:
        digest.update(piece)
        start += piece[:PHRASE_START - len(start)]
    if new:
        refuse_weak(start)
    elsewhere = "make the key on another machine and copy it"
    if not hasattr(hashlib, "scrypt"):
        raise Failure("cannot make a key from text", "this Python was built without scrypt", elsewhere)
    try:        # scrypt makes every guess dear
        return hashlib.scrypt(digest.digest(), salt=SCRYPT_SALT, n=SCRYPT_COST, r=8, p=1, maxmem=SCRYPT_MEMORY,
                              dklen=32)
    except (ValueError, MemoryError) as problem:
        if isinstance(problem, MemoryError) or "malloc" in str(problem):
            why, hint = "out of memory", "scrypt takes 128 MiB; try again, or " + elsewhere
        else:
            why, hint = "OpenSSL refuses scrypt here (%s)" % problem, "a policy such as FIPS forbids it; " + elsewhere
        raise Failure("cannot make a key from text", why, hint) from None


class Key:
    """What the tools need of one half of a key.

    path         the file, for load_cert_chain: its first two blocks are this half's own identity
    text         that file's bytes, where it is not there: a submitting half that was made of the private one
    name         the key as the user named it, for logs
    private      whether this is the private half (own is the worker, peer is the client; else the reverse)
    id           4 bytes that name the key in datagrams: the start of the SHA-256 of the worker's certificate
    fingerprint  the same hash for people, 16 bytes of it
    udp          32 bytes that authenticate datagrams
    own_der, peer_der, peer_pem   the certificates to show and to demand (peer_pem is a str, for cadata=)
    """

    __slots__ = ("path", "text", "name", "private", "id", "fingerprint", "udp", "own_der", "peer_der", "peer_pem")

    def __init__(self, path, private, blocks):
        self.path = self.name = path
        self.text = None
        self.private, self.own_der, self.peer_der = private, blocks[1], blocks[-1]
        digest = hashlib.sha256(self.own_der if private else self.peer_der).digest()
        self.id, self.fingerprint = digest[:4], "SHA256:" + digest[:16].hex()
        self.udp = hkdf(blocks[2 if private else 0], UDP_LABEL, 32)     # the client's private key: both halves have it
        self.peer_pem = pem_text([b"CERTIFICATE"], [self.peer_der]).decode("ascii")


def parse_key(text, path):
    """The Key in the bytes of a key file; Failure when they are not what ckeygen wrote."""
    try:
        labels, blocks = key_blocks(text)
    except ProtocolError as problem:
        raise Failure("%s is not a key" % path, str(problem), "copy it again, or make it with ckeygen",
                      EXIT_USAGE) from None
    return Key(path, labels == PRIVATE_LABELS, blocks)


# ---------------------------------------------------------------- session
#
# Pure: bytes and times in, events and bytes out.  A session has a phase; a message moves it along the table, and a
# message that has no entry for the role and the phase is an error.  Several jobs may run in it, one after another:
# what comes before the next job message belongs to the old one.  While a job runs each descriptor has up to two
# streams, which open, stop and end each by itself.

SUBMITTER, WORKER = "submitter", "worker"
GREETING, CHOSEN, IDLE, OFFERED, STARTING, RUNNING, ENDED, OVER = (
    "greeting", "chosen", "idle", "offered", "starting", "running", "ended", "over")


def _table():
    table = {
        (SUBMITTER, GREETING, HELLO): IDLE,
        (SUBMITTER, IDLE, ABORT): OVER,             # the worker takes no more jobs here
        (SUBMITTER, OFFERED, ABORT): OVER,          # the same, said before it had read of this one
        (SUBMITTER, OFFERED, ACCEPTED): RUNNING,
        (SUBMITTER, OFFERED, REFUSED): OVER,
        (SUBMITTER, RUNNING, EXIT): IDLE,
        (SUBMITTER, RUNNING, ABORT): OVER,
        (WORKER, GREETING, WELCOME): CHOSEN,
        (WORKER, GREETING, BYE): OVER,              # it will never be chosen
        (WORKER, CHOSEN, JOB): STARTING,
        (WORKER, CHOSEN, BYE): OVER,
        (WORKER, ENDED, JOB): STARTING,
        (WORKER, ENDED, BYE): OVER,
    }
    for kind in (DATA, END, STOP, CREDIT, PING, PONG, EMPTIED, OTHERS_WAIT):
        table[SUBMITTER, RUNNING, kind] = RUNNING
    for kind in (DATA, END, STOP, CREDIT, PING, PONG, SIGNAL, WINDOW):
        for phase in (STARTING, RUNNING, ENDED):    # the submitter goes on until it has heard of the end
            table[WORKER, phase, kind] = phase
    for kind in (PING, PONG):
        for role, phase in (SUBMITTER, IDLE), (SUBMITTER, OFFERED), (WORKER, CHOSEN):
            table[role, phase, kind] = phase
    return table


PHASES = _table()


class Stream:
    """One direction of one descriptor.  state: "open", "stopped" (nobody reads any more) or "ended"."""
    __slots__ = ("state", "credit", "window", "returned", "stamp")

    def __init__(self, window):
        self.state = "open"
        self.credit = window        # bytes that may still be sent
        self.window = window        # receiver: credit given out in all when everything is consumed
        self.returned = 0           # receiver: consumed, not yet given back
        self.stamp = 0.0            # receiver: when credit was last given back


class Session:
    """The conversation on one connection, one side of it.

    receive(data, now) yields events (type, number, body); what must go to the peer gathers in `outbox`.
    now is monotonic seconds.  After ProtocolError the session is OVER.
    """

    def __init__(self, role, timeout, now):
        self.role = role
        self.timeout = timeout
        self.phase = GREETING
        self.welcomed = False           # submitter: whether welcome has been said
        self.reader = FrameReader()
        self.outbox = bytearray()
        self.sending = {}               # {descriptor: Stream} of the job in hand
        self.receiving = {}
        self.windows = 0                # sum of the windows in `receiving`
        self.owing = {}                 # {number: None} of those whose credit waits until the peer has read more
        self.heard = now
        self.pinged = now
        self.ticked = now
        self.round_trip = None          # the shortest that was seen, seconds
        self.paused = False             # the peer has said that it will be silent

    # -- from the peer
    def receive(self, data, now):
        self.heard = now
        try:
            for kind, number, body, size in self.reader.read(data):
                phase = PHASES.get((self.role, self.phase, kind))
                if phase is None:
                    raise ProtocolError("a %s message to a %s in phase %s" % (
                        MESSAGE_NAMES[kind], self.role, self.phase))
                self.phase = phase
                event = self.RECEIVED[kind](self, kind, number, body, size, now)
                if event:
                    yield event
                if self.phase is OVER:
                    return
        except ProtocolError:
            self.phase = OVER
            raise

    def _pass_on(self, kind, number, body, size, now):
        return kind, number, body

    def _words(self, kind, number, body, size, now):
        return kind, number, unpack_words(body)

    def _job(self, kind, number, body, size, now):
        job = parse_job(body)
        self.open_streams(job.descriptors)
        self.timeout = job.timeout
        return kind, number, job

    def _accepted(self, kind, number, body, size, now):
        self._learn_round_trip(now)
        return kind, number, body

    def _exit(self, kind, number, body, size, now):
        report = parse_exit(body)
        missing = [fd for fd, stream in self.receiving.items() if stream.state == "open"]
        if missing:
            raise ProtocolError("an exit before the end of descriptor %d" % missing[0])
        if report.last:
            self.phase = OVER
        return kind, number, report

    def _stream(self, streams, number):
        stream = streams.get(number)
        if stream is None:
            raise ProtocolError("a message for descriptor %d, which is not open that way" % number)
        return stream

    def _data(self, kind, number, body, size, now):
        stream = self._stream(self.receiving, number)
        if stream.state == "ended":
            raise ProtocolError("data after the end on descriptor %d" % number)
        if size > stream.credit:
            raise ProtocolError("data beyond the credit on descriptor %d" % number)
        stream.credit -= size
        return (DATA, number, body) if len(body) and stream.state == "open" else None

    def _end(self, kind, number, body, size, now):
        stream = self._stream(self.receiving, number)
        if stream.state == "ended":
            raise ProtocolError("a second end on descriptor %d" % number)
        was, stream.state = stream.state, "ended"
        return (END, number, b"") if was == "open" else None

    def _stop(self, kind, number, body, size, now):
        self._stream(self.sending, number)
        if len(body) != (COUNT.size if self.role is SUBMITTER else 0):
            raise ProtocolError("a stop message of %d bytes" % len(body))
        self.end(number)
        return (STOP, number, COUNT.unpack(body)[0] if body else None) if self.phase is not ENDED else None

    def _credit(self, kind, number, body, size, now):
        stream = self._stream(self.sending, number)
        if len(body) != 4:
            raise ProtocolError("a credit message of %d bytes" % len(body))
        stream.credit += struct.unpack(">I", body)[0]
        if stream.credit > WINDOW_MAX:
            raise ProtocolError("credit beyond %d on descriptor %d" % (WINDOW_MAX, number))
        return CREDIT, number, b""

    def _emptied(self, kind, number, body, size, now):
        self._stream(self.sending, number)
        return kind, number, None

    def _others_wait(self, kind, number, body, size, now):
        if number > 1:
            raise ProtocolError("an others-wait message that says neither yes nor no")
        return kind, number, bool(number)

    def _signal(self, kind, number, body, size, now):
        if number >= len(SIGNALS):
            raise ProtocolError("signal %d, which is not passed on" % number)
        name = SIGNALS[number]
        self.paused = name == "TSTP" or (self.paused and name != "CONT")
        return (SIGNAL, number, name) if self.phase is not ENDED else None

    def _window(self, kind, number, body, size, now):
        if len(body) != 4:
            raise ProtocolError("a window message of %d bytes" % len(body))
        return (WINDOW, number, struct.unpack(">HH", body)) if self.phase is not ENDED else None

    def _ping(self, kind, number, body, size, now):
        if len(self.outbox) < CONTROL_MAX // 2:     # who pings without reading gets no more answers
            self.outbox += frame(PONG, 0, body[:8])

    def _pong(self, kind, number, body, size, now):
        if len(body) == 8:
            trip = now - struct.unpack(">d", body)[0]
            if 0 <= trip < math.inf:
                self.round_trip = trip if self.round_trip is None else min(trip, self.round_trip)

    RECEIVED = {WELCOME: _pass_on, HELLO: _pass_on, JOB: _job, ACCEPTED: _accepted, REFUSED: _words, ABORT: _words,
                BYE: _pass_on, DATA: _data, END: _end, STOP: _stop, CREDIT: _credit, SIGNAL: _signal, WINDOW: _window,
                PING: _ping, PONG: _pong, EXIT: _exit, EMPTIED: _emptied, OTHERS_WAIT: _others_wait}

    # -- to the peer
    def open_streams(self, descriptors):
        """New streams for a job's descriptors, {number: kind}.  The windows of one direction are bounded in sum."""
        upward = [fd for fd, kind in descriptors.items() if kind in UPWARD]
        downward = [fd for fd, kind in descriptors.items() if kind in DOWNWARD]
        sending, receiving = (upward, downward) if self.role is SUBMITTER else (downward, upward)
        self.sending, self.receiving = (
            {fd: Stream(min(WINDOW_START, WINDOWS_MAX // len(numbers))) for fd in numbers}
            for numbers in (sending, receiving))
        self.windows = sum(stream.window for stream in self.receiving.values())
        self.owing = {}
        self.paused = False

    def hello(self, address, instance, sees_reading=False, host=""):
        """The worker's first words."""
        self.outbox += frame(HELLO, 0, encode_hello(address, instance, sees_reading, host))

    def offer(self, job, address):
        """The submitter's choice falls on this worker: for its first job, or for the next one."""
        if not self.welcomed:
            self.welcomed = True
            self.outbox += frame(WELCOME, 0, encode_greeting(address))
        self.outbox += frame(JOB, 0, encode_job(job))
        self.open_streams(job.descriptors)
        self.phase = OFFERED

    def accept(self, now):
        self.outbox += frame(ACCEPTED)
        self.phase = RUNNING
        self._learn_round_trip(now)

    def _learn_round_trip(self, now):
        """By a ping of each side, for the window of what it receives: to start a job takes longer than many a trip."""
        if self.round_trip is None:
            self.ping(now)

    def refuse(self, words, final=False):
        """final: asking this worker again would be in vain."""
        self.outbox += frame(REFUSED, int(final), pack_words(words))
        self.phase = OVER

    def abort(self, words):
        """The worker gives the job up, or takes no more: the submitter's user reads the words."""
        self.outbox += frame(ABORT, 0, pack_words(words))
        self.phase = OVER

    def exit(self, report):
        self.outbox += frame(EXIT, 0, encode_exit(report))
        for stream in self.receiving.values():
            if stream.state == "open":
                stream.state = "stopped"        # what still comes belongs to nobody
        self.phase = ENDED

    def bye(self, never=False):
        """never: the search that it has answered will not take this worker."""
        if self.phase is IDLE:
            self.outbox += frame(BYE, int(never))
        self.phase = OVER

    def signal(self, name):
        self.outbox += frame(SIGNAL, SIGNALS.index(name))

    def window(self, rows, columns):
        self.outbox += frame(WINDOW, 0, struct.pack(">HH", rows, columns))

    def ping(self, now):
        self.pinged = now
        self.outbox += frame(PING, 0, struct.pack(">d", now))

    def may_send(self, number):
        """How many bytes of data the peer takes on this descriptor now."""
        stream = self.sending[number]
        return stream.credit if stream.state == "open" else 0

    def data(self, buffer, at, number, size):
        """Writes the header of a data message into the buffer; its `size` bytes follow there already."""
        self.sending[number].credit -= size
        FRAME_HEAD.pack_into(buffer, at, DATA, 0, number, size)

    def end(self, number):
        stream = self.sending[number]
        if stream.state == "open":
            stream.state = "ended"
            self.outbox += frame(END, number)

    def stop(self, number, consumed=None):
        """Nobody here reads this descriptor's data any more.  consumed: at a worker, how much its job has read."""
        stream = self.receiving[number]
        if stream.state == "open":
            stream.state = "stopped"
            self.outbox += frame(STOP, number, b"" if self.role is SUBMITTER else COUNT.pack(consumed))

    def emptied(self, number):
        """The job has read all that it was sent of an input that is copied: from now on it may be sent eagerly."""
        self.outbox += frame(EMPTIED, number)

    def others_wait(self, waiting):
        """Whether others wait for this job's slot, or the worker wants it back: a job that can give it back does."""
        self.outbox += frame(OTHERS_WAIT, int(waiting))

    def consumed(self, number, size, now):
        """So much data has left this process: its credit goes back in quarters of the window."""
        stream = self.receiving[number]
        stream.returned += size
        if stream.state == "open" and stream.returned >= stream.window // 4:
            if len(self.outbox) < CONTROL_MAX // 2:     # who sends without reading gets no more credit
                self._give_credit(number, stream, now)
            else:
                self.owing[number] = None

    def repay(self, now):
        """Gives the credit that had to wait, as far as the peer has read what was said before.  To be called before
        the outbox is sent."""
        while self.owing and len(self.outbox) < CONTROL_MAX // 2:
            number, _ = self.owing.popitem()
            if self.receiving[number].state == "open":
                self._give_credit(number, self.receiving[number], now)

    def _give_credit(self, number, stream, now):
        extra = self._growth(stream, now)
        stream.window += extra
        self.windows += extra
        stream.stamp = now
        self.outbox += frame(CREDIT, number, struct.pack(">I", stream.returned + extra))
        stream.credit += stream.returned + extra
        stream.returned = 0

    def _growth(self, stream, now):
        """A quarter consumed in less than half a round trip, or at more than some 25 MB/s on a short path: then the
        window limits, not the consumer."""
        trip = self.round_trip or 0
        if now - stream.stamp > max(trip / 2, FAST_QUARTER):
            return 0
        limit = WINDOW_MAX if trip >= LONG_TRIP else WINDOW_NEAR
        return stream.window if 2 * stream.window <= limit and self.windows + stream.window <= WINDOWS_MAX else 0

    # -- silence
    def tick(self, now):
        """Pings a peer that is silent; returns whether it has been for too long.  Called several times per timeout."""
        asleep, self.ticked = now - self.ticked > self.timeout / 2, now
        if self.paused or asleep:       # a peer that was suspended, or this process itself was: silence proves nothing
            self.heard = now
            return False
        quiet = now - self.heard
        if quiet > self.timeout / 4 and now - self.pinged > self.timeout / 4:
            self.ping(now)
        return quiet > self.timeout


# ---------------------------------------------------------------- calls
#
# What an Executor and the loop of calls in an interpreter say to each other, on two descriptors of the job: messages of
# a head and a pickle; where there are buffers (those of pickle protocol 5) the sizes of pickle and buffers stand before
# it, and each buffer begins at a multiple of ALIGN from the message's beginning.  Every CALL has one answer: RETURNED
# or RAISED, in the order of the calls, or DROPPED: it was not run.  So ends what was sent behind a call that took
# longer than CALL_PAUSE, since the submitter may have given it to others meanwhile.

CALLS, ANSWERS, PROGRAM, STATUS = 3, 4, 5, 6        # the job's descriptors; the worker opens the last two
CALL_DESCRIPTORS = {1: OUT, 2: OUT, CALLS: IN, ANSWERS: OUT}
CALL_VERSION = "1"
CALL_HEAD = struct.Struct(">BxHIIQ")    # kind; buffers; number; microseconds that the call took; size without the head
(SETUP, CALL, DROP, REPLY,                                  # to the interpreter
 READY, RETURNED, RAISED, DROPPED, WANTED, ENOUGH) = range(10)      # from it
CALL_MAX = 1 << 42          # bytes of one message; no memory holds more
BUFFERS_MAX = 1 << 12       # of one call; more of them go into the pickle
BUFFER_LEAST = 1 << 16      # bytes of a buffer that does not
ALIGN = 64                  # what the fastest instructions for arrays like

CALLS_BUSY = 0.02           # seconds of work that are sent ahead to an interpreter, beside the round trip
CALL_LEAST = 2e-5           # seconds that any call takes
CALL_PAUSE = 0.05           # seconds of a call after which what was sent ahead is the submitter's again
CALL_LONG = 2 * CALL_PAUSE  # seconds after which the submitter gives it to others; doubled where that was an error
CALLS_BYTES = 1 << 22       # bytes of arguments that are sent ahead, once there is a second call

# A call at the submitter.  It is its submitter's until it has begun: then it may have done something.
CallState = enum.IntEnum("CallState", "QUEUED SENT BEGUN OVER")
CALL_STATES = {
    (CallState.QUEUED, "sent"): CallState.SENT,
    (CallState.SENT, "its turn"): CallState.BEGUN,
    (CallState.SENT, "taken back"): CallState.QUEUED,
    (CallState.BEGUN, "lost"): CallState.QUEUED,
}
CALL_STATES.update({(state, event): CallState.OVER for state in (CallState.QUEUED, CallState.SENT, CallState.BEGUN)
                    for event in ("answered", "failed", "cancelled")})

# An interpreter at the submitter, from the search for a slot on.
InterpreterState = enum.IntEnum("InterpreterState", "SEEKING BOOTING SERVING LEAVING")
INTERPRETER_STATES = {
    (InterpreterState.SEEKING, "started"): InterpreterState.BOOTING,
    (InterpreterState.BOOTING, "ready"): InterpreterState.SERVING,
    (InterpreterState.BOOTING, "lost"): InterpreterState.SEEKING,     # the pool looks for another worker
    (InterpreterState.BOOTING, "leave"): InterpreterState.LEAVING,
    (InterpreterState.SERVING, "leave"): InterpreterState.LEAVING,
}


def next_state(table, state, event, whose="a call"):
    """Where the event leads to, to be recorded before anything is done about it; RuntimeError for what has no entry in
    the table."""
    if (state, event) not in table:
        event, state = (getattr(each, "name", each) for each in (event, state))
        raise RuntimeError("%s: event %s in state %s" % (whose, event, state))
    return table[state, event]


def calls_most(seconds, trip):
    """How many calls an interpreter owes at most, where one takes so many seconds (None: not known yet): enough to keep
    it busy until the next ones come, and one where they are long."""
    return 1 if seconds is None else 1 + int((CALLS_BUSY + trip) / max(seconds, CALL_LEAST))


def encode_call(kind, number=0, data=b"", buffers=(), microseconds=0):
    """The parts (bytes and views) of a message."""
    if not buffers:
        head = CALL_HEAD.pack(kind, 0, number, min(microseconds, U32_MAX), len(data))
        return [head + data] if len(data) < BUFFER_LEAST else [head, data]
    sizes = struct.pack(">%dQ" % (len(buffers) + 1), len(data), *map(len, buffers))
    parts, size = [sizes, data], len(sizes) + len(data)
    for buffer in buffers:
        gap = -(CALL_HEAD.size + size) % ALIGN
        parts += [bytes(gap), buffer]
        size += gap + len(buffer)
    return [CALL_HEAD.pack(kind, len(buffers), number, min(microseconds, U32_MAX), size), *parts]


def pack_strings(*texts):
    return pack_texts([text.encode("utf-8", "replace") for text in texts])


def unpack_strings(body):
    return [text.decode("utf-8", "replace") for text in unpack_texts(body)]


def encode_ready(python, failed=()):
    """python: (major, minor).  failed: the traceback and the words of what the initializer raised, if it did."""
    return pack_strings(CALL_VERSION, "%d.%d" % python, *failed)


def parse_ready(body):
    """(python, failed) of encode_ready()."""
    texts = unpack_strings(body)
    if texts[:1] != [CALL_VERSION]:
        raise ProtocolError("a cservice of another version")
    numbers = "".join(texts[1:2]).split(".")
    if len(numbers) != 2 or not all(map(whole, numbers)) or len(texts) not in (2, 4):
        raise ProtocolError("an interpreter that does not say what it is")
    return tuple(map(int, numbers)), texts[2:]


def encode_question(kind, name, more):
    return pack_strings(kind, name, more)


def parse_question(body):
    """(kind, name, more) of encode_question()."""
    texts = unpack_strings(body)
    if len(texts) != 3:
        raise ProtocolError("a question of an interpreter cut short")
    return texts


class CallReader:
    """Cuts a stream of bytes into messages of calls."""

    def __init__(self):
        self.begun = bytearray()        # of a message that is not complete

    def read(self, data):
        """Yields (kind, number, microseconds, pickle, [buffer]) of each message that data completes; pickle and buffers
        are bytes or views of memory that nobody else has.  ProtocolError for what no encoder makes."""
        view = memoryview(data)
        if self.begun:
            view = self._fill(view)
            if len(self.begun) < CALL_HEAD.size or len(self.begun) < CALL_HEAD.size + self._head(self.begun)[-1]:
                return
            message, self.begun = self.begun, bytearray()
            yield self._parts(message)
        at, end = 0, len(view)
        while end - at >= CALL_HEAD.size:
            kind, buffers, number, microseconds, size = self._head(view, at)
            start, behind = at + CALL_HEAD.size, at + CALL_HEAD.size + size
            if behind > end:
                break
            if buffers:
                yield self._parts(bytearray(view[at:behind]))       # arrays are to be writable
            else:
                yield kind, number, microseconds, bytes(view[start:behind]), []
            at = behind
        self.begun += view[at:]

    @staticmethod
    def _head(view, at=0):
        """What the message says that begins there: kind, buffers, number, microseconds, size."""
        head = kind, buffers, _, _, size = CALL_HEAD.unpack_from(view, at)
        if kind > ENOUGH or buffers > BUFFERS_MAX or not (8 * buffers + 8 if buffers else 0) <= size <= CALL_MAX:
            raise ProtocolError("a message of calls that no Executor sends")
        return head

    def _fill(self, view):
        """Completes, as far as the data goes, the message that has begun; returns what is left of the data."""
        missing = CALL_HEAD.size - len(self.begun)
        if missing > 0:
            self.begun += view[:missing]
            view = view[missing:]
        if len(self.begun) >= CALL_HEAD.size:
            missing = CALL_HEAD.size + self._head(self.begun)[-1] - len(self.begun)
            self.begun += view[:missing]
            view = view[missing:]
        return view

    @staticmethod
    def _parts(message):
        kind, count, number, microseconds, _ = CALL_HEAD.unpack_from(message)
        view = memoryview(message)[CALL_HEAD.size:]
        if not count:
            return kind, number, microseconds, view, []
        sizes = struct.unpack_from(">%dQ" % (count + 1), view)
        view, at, parts = memoryview(message), CALL_HEAD.size + 8 * (count + 1), []
        for size in sizes:
            parts.append(view[at:at + size])
            at += size
            at += -at % ALIGN if len(parts) <= count else 0
        if at != len(view):
            raise ProtocolError("buffers of a call that do not add up")
        return kind, number, microseconds, parts[0], parts[1:]


# ---------------------------------------------------------------- slots: what a worker has to give
#
# A slot belongs to a connection: it is offered to one search, may serve several jobs of that submitter in turn, and is
# free when nothing of the last one is left.  The daemon has the truth; a handler reports each of its events by the
# link before it acts on it.

SlotState = enum.Enum("SlotState", "CONNECTING ASKED HANDSHAKE RUNNING IDLE LEAVING FREE")
SlotEvent = enum.Enum("SlotEvent", "CONNECTED GO JOB EXIT LEAVE STAY")

SLOTS = {
    (SlotState.CONNECTING, SlotEvent.CONNECTED): SlotState.ASKED,
    (SlotState.CONNECTING, SlotEvent.LEAVE): SlotState.FREE,
    (SlotState.ASKED, SlotEvent.GO): SlotState.HANDSHAKE,
    (SlotState.ASKED, SlotEvent.LEAVE): SlotState.FREE,
    (SlotState.HANDSHAKE, SlotEvent.JOB): SlotState.RUNNING,
    (SlotState.HANDSHAKE, SlotEvent.LEAVE): SlotState.FREE,
    (SlotState.RUNNING, SlotEvent.EXIT): SlotState.IDLE,
    (SlotState.RUNNING, SlotEvent.LEAVE): SlotState.LEAVING,    # the job goes on, or is being ended
    (SlotState.IDLE, SlotEvent.JOB): SlotState.RUNNING,
    (SlotState.IDLE, SlotEvent.LEAVE): SlotState.FREE,
    (SlotState.LEAVING, SlotEvent.LEAVE): SlotState.LEAVING,    # told so again, or its submitter or handler has gone
    (SlotState.LEAVING, SlotEvent.STAY): SlotState.RUNNING,     # nobody waits any more
    (SlotState.LEAVING, SlotEvent.EXIT): SlotState.FREE,
}
PENCILLED = SlotState.CONNECTING, SlotState.ASKED       # offered, and not taken yet
WITH_JOB = SlotState.RUNNING, SlotState.LEAVING


# id, user: as in Job.  submitter: its address, as it says it.  began: monotonic seconds.
SlotJob = collections.namedtuple("SlotJob", "id submitter user began")


class Slot:
    """One slot of a worker, from the offer to a search until it is free.  A Responder makes it and forgets it.

    answer: what its preamble says.  origin: whom it was offered to.  since: when it was offered, got its GO or began
    with its first job, whichever was last; connected: when the connection was made.  reserved: whether
    it counts against the worker's slots; an offer that has been silent does not any more.  job: the SlotJob it has, or
    had last.  jobs: how many it has had.
    """
    __slots__ = "search answer origin state since connected reserved job jobs".split()

    def __init__(self, search, answer, origin, now):
        self.search, self.answer, self.origin = search, answer, origin
        self.state = SlotState.CONNECTING
        self.since = now
        self.connected = None
        self.reserved = True
        self.job = None
        self.jobs = 0

    def move(self, event):
        whose = "slot of job %s" % (self.job.id if self.job else "none yet",)
        self.state = next_state(SLOTS, self.state, event, whose)


# ---------------------------------------------------------------- jobs: what becomes of one at its submitter
#
# A job waits for a worker, is offered to one, runs there, is delivered here, and is done; a lost worker lets it wait
# again.  Whoever wants to know where a job is asks its state: nothing else says the same.

JobState = enum.Enum("JobState", "WAITING OFFERED RUNNING DELIVERING DONE")
JobEvent = enum.Enum("JobEvent", "FOUND ACCEPTED EXIT DELIVERED REFUSED NOT_STARTED LOST WITHDRAWN FAILED CANCELLED "
                                 "TIMED_OUT")

JOBS = {
    (JobState.WAITING, JobEvent.FOUND): JobState.OFFERED,
    (JobState.WAITING, JobEvent.FAILED): JobState.DONE,
    (JobState.WAITING, JobEvent.CANCELLED): JobState.DONE,
    (JobState.OFFERED, JobEvent.ACCEPTED): JobState.RUNNING,
    (JobState.OFFERED, JobEvent.REFUSED): JobState.WAITING,
    (JobState.OFFERED, JobEvent.NOT_STARTED): JobState.WAITING,
    (JobState.OFFERED, JobEvent.LOST): JobState.WAITING,
    (JobState.OFFERED, JobEvent.WITHDRAWN): JobState.WAITING,
    (JobState.OFFERED, JobEvent.FAILED): JobState.DONE,
    (JobState.OFFERED, JobEvent.CANCELLED): JobState.DONE,
    (JobState.RUNNING, JobEvent.EXIT): JobState.DELIVERING,
    (JobState.RUNNING, JobEvent.LOST): JobState.WAITING,        # where it may start again; else it has failed
    (JobState.RUNNING, JobEvent.WITHDRAWN): JobState.WAITING,
    (JobState.RUNNING, JobEvent.FAILED): JobState.DONE,
    (JobState.RUNNING, JobEvent.CANCELLED): JobState.DONE,
    (JobState.RUNNING, JobEvent.TIMED_OUT): JobState.DONE,
    (JobState.DELIVERING, JobEvent.DELIVERED): JobState.DONE,
    (JobState.DELIVERING, JobEvent.FAILED): JobState.DONE,
    (JobState.DELIVERING, JobEvent.CANCELLED): JobState.DONE,
}
AT_WORKER = JobState.OFFERED, JobState.RUNNING
AVOID = 0.25                # seconds that a worker which failed the job is passed over, doubled with each failure
AVOID_DOUBLINGS = 5         # up to eight seconds
ADDRESS_DOUBLINGS = 7       # for an address, up to half a minute: many may take turns, and others are to get theirs
FAILURES_AT_ONCE = 16       # failures of a job after which it waits itself, an eighth as long
REFUSALS_AT_ONCE = 64       # the same for those that are final, which each worker can say once
BAD_ADDRESS = 3             # workers in a row that failed the job at one address: it may be one under many names


def why_not_again(committed, losses, retries, signalled, can_rewind):
    """What a user is told to do about a job whose worker was lost and that may not start again; "" where it may."""
    if committed:
        return "its output had begun, so it was not started elsewhere; run it again if that does no harm"
    return "run it again" if losses > retries or signalled or not can_rewind else ""


class Avoidance:
    """Which workers one job passes over, and for how long it waits itself.  Times are seconds.

    What is avoided is an instance of a worker.  An address is avoided when different instances at it have failed the
    job in a row and none has succeeded, the longer the more; not where another job of the submitter runs, for a cproxy
    has many workers behind one address.  A job that has failed often waits, so that nobody is asked without end, but
    for less long than those are avoided, or nobody else would ever be asked.
    """

    def __init__(self):
        self.until = {}             # {instance: when it may be asked again}
        self.refused = {}           # {instance: its words} of those that will never take the job
        self.at_address = {}        # {address: ({instance: None} of those that failed there, until when)}
        self.failures = 0
        self.wait_until = -math.inf

    def avoid(self, instance):
        """For ever."""
        self.until[instance] = math.inf

    def failed(self, now, instance, address, final=None):
        """A worker has failed the job; final: its words, where it will never take it.  Returns for how many seconds it
        is passed over."""
        self.failures += 1
        pause = AVOID * 2 ** min(self.failures - 1, AVOID_DOUBLINGS)
        self.until[instance] = now + pause if final is None else math.inf
        if final is not None:
            self.refused[instance] = final
        instances = self.at_address.get(address, ({}, 0))[0]
        instances[instance] = None
        self.at_address[address] = instances, now + AVOID * 2 ** min(len(instances) - 1, ADDRESS_DOUBLINGS)
        if self.failures > (FAILURES_AT_ONCE if final is None else REFUSALS_AT_ONCE):
            self.wait_until = now + pause / 8
        return pause

    def succeeded(self, address):
        """A job of the submitter has ended at this address."""
        self.at_address.pop(address, None)

    def passes_over(self, now, instance, address, in_use):
        """Whether this worker is not asked now.  in_use: the addresses at which the submitter has jobs."""
        if self.until.get(instance, now) > now:
            return True
        instances, until = self.at_address.get(address, ((), now))
        return len(instances) >= BAD_ADDRESS and until > now and address not in in_use


# A worker as a search knows it.  name: what it is called.  at: when it was heard last, seconds.  here: its Here, or
# None.  words: why it was of no use, or None.
HeardWorker = collections.namedtuple("HeardWorker", "at name here words")

# What is known about a search for workers.  heard: HeardWorkers.  group, key_name, fingerprint: texts.  udp_port: where
# announcements go.  port: where workers connect to, 0 where there was no search.  ways: the interfaces, as a text.
# unsent, unused: texts, each about what could not be sent, and why a connection came to nothing.  no_port: the Failure
# of a search that found no port, or None.  last_loss: what became of the job's last worker.
SearchFacts = collections.namedtuple(
    "SearchFacts", "heard group key_name fingerprint udp_port port ways unsent unused no_port last_loss")


CHECK_AFTER = 10.0          # seconds without any answer until the line names cwho --check


class Diagnosis:
    """Why a job waits, or got no worker, in words; of what was heard since a time.  Pure."""

    def __init__(self, facts, since):
        self.facts = facts
        heard = [each for each in facts.heard if each.at >= since]
        told = {each.name for each in heard if each.here}
        # Here of each worker that is there, None for one that has only connected; words of each that was of no use.
        self.alive = [each.here for each in heard
                      if (each.here.state != UNREACHABLE if each.here else not each.words and each.name not in told)]
        self.trouble = ["%s %s%s" % (each.name, "" if each.here else "failed: ", each.words) for each in heard
                        if each.words and (not each.here or each.here.state == UNREACHABLE)]
        self.unreachable = any(each.here and each.here.state == UNREACHABLE for each in facts.heard)

    def waiting(self, seconds, earlier):
        """The line for a user who has waited for so long.  earlier: the Diagnosis of the whole time."""
        words = [str(self.facts.no_port)] if self.facts.no_port else []
        if self.alive:
            states = {here.text() if here else "connected" for here in self.alive}
            words.append("waiting: %s, %s" % (
                count_text(len(self.alive), "worker"),
                "none free" if len(states) > 1 else "all " * (len(self.alive) > 1) + states.pop()))
        nobody = not (self.alive or earlier.trouble or words)
        words += ["nobody has answered yet"] if nobody else earlier.trouble[-1:]
        return "%s, %.0f s%s%s" % (
            "; ".join(words), seconds,
            "; cwho --check %s finds out why" % shell_word(
                self.facts.key_name) if nobody and seconds >= CHECK_AFTER else "",
            "; before that, " + self.facts.last_loss if self.facts.last_loss else "")

    def failure(self, seconds, unproven=False):
        """(why, hint) of the failure of a job that got no worker within so many seconds.  unproven: whether workers
        went on saying that they are there, and none has shown that it is one."""
        facts = self.facts
        if facts.no_port:
            return "within %.3g s %s" % (seconds, facts.no_port), facts.no_port.hint
        why = "%s within %.3g s" % (
            "no worker that says it is there has shown that it has the private key" if unproven else
            "no worker was free" if self.alive else
            "none of the workers that answered took the job" if self.trouble else "nobody answered", seconds)
        states = sorted({here.text() for here in self.alive if here})
        if states:
            why += " (%s)" % ", ".join(states)
        if facts.last_loss:
            why = "%s; since then %s" % (facts.last_loss, why)
        if facts.port:
            why += "; announced on %s by %s, to connect back to TCP port %d" % (facts.group, facts.ways, facts.port)
        if facts.unsent:
            why += "; could not send: " + ", ".join(facts.unsent)
        hint = self._hint(unproven)
        return "; ".join([why, *facts.unused]), "%s%s cwho --check %s finds out more" % (
            hint, " " if hint.endswith("?") else ";", shell_word(facts.key_name))

    def _hint(self, unproven):
        if self.unreachable and (unproven or not self.alive):
            return "a firewall here or on the way keeps out what workers connect to; --listen-ports names ports to open"
        if unproven:
            return "whoever has %s can speak for workers that are not there" % shell_word(self.facts.key_name)
        if self.alive:
            return "CEXEC_TIMEOUT_ACCEPT=0 waits for ever"
        if self.trouble:
            return "-v tells what each worker did"
        return ("is cservice running with this key (%s) in this network?  do firewalls pass UDP port %d to it and TCP "
                "back?" % (self.facts.fingerprint, self.facts.udp_port))


# ---------------------------------------------------------------- choice: which worker runs the job
#
# Every worker hears an announcement and sets a timer that grows with its cost, plus a random part. The first ones to
# fire connect; the submitter tells the rest to hold, takes the first good one and tells all that the job is taken.
# A shared offset is added to all timers: submitters compute it from what they saw and workers remember it, so it
# follows the size, load and speed of the cluster, which nobody needs to know. Times are seconds.

JITTER = 0.003          # scale of the random part: about the time from the first connection until all have heard of it
PER_COST = 0.048        # delay per unit of cost (cost is a logarithm: twice as loaded or half as fast waits 33 ms more)
OFFSET_UNSET = 0.018    # a worker that has heard nothing yet does not know how many others it would collide with
OFFSET_RANGE = (-0.15, 0.12)     # bounds the offset, so that one bad TAKEN cannot delay workers for long
HIGH_HALF_LIFE = 600.0  # the highest offset is forgotten by halves
QUIET = 2.0             # after so long without a job the cluster may have become idle, so start near the highest offset
QUIET_REST = 0.006
SETTLED = 0.0002        # a wait that has grown by less than this since the timer was set does not matter
HOLD_TIME = 0.02        # longer than a handshake on a busy machine, too short for a stalled worker to be noticed
HOLD_MOST = 1.0         # what all holds of one search together can defer one worker
SPEAK_GAP = 0.0003      # holds and takens closer together than this tell nothing new
LOAD_LAG = 5.0          # the outside load is smoothed over this time
PENALTY = 3.0           # added to the cost of a ratted-out worker: any other goes first, a lone one still serves
PER_SOURCE = 128        # announcements remembered for one submitting host, the oldest jobs first
PENDING_MOST = 1024     # and in all; each event looks through them, which takes a third of a millisecond at worst
ANSWERED_MOST = 1024    # nonces that have been answered: most get no second connection
REFUSALS_MOST = 2       # a search whose submitter has refused so often is over
OFFER_RESERVES = 1.0    # an offer keeps its slot from others for so long
SILENT_PATIENCE = 0.1   # while others wait, less if the submitter has not shown that it is there: so long, or two round
                        # trips, from the connected moment on; the more such there are, the sooner
SILENT_MARK = 3.0       # an address and port that was silent comes behind others for so long
SILENT_MOST = 1024      # such marks
LAPSED_MOST = 64        # offers that have lapsed but may still be taken
TURN = 0.5              # that a submitter keeps a connection while others wait
FIRST_JOB = 3.0         # from GO to the first job while others wait: a distant handshake takes several round trips
PORT_LEAST = 1024       # nobody makes a worker connect to a system's own services
FORGET = 2.5            # a waiting submitter not heard for so many of its intervals is gone
INTERVAL_RANGE = (0.04, 10.0)
CONNECT_GAP = 0.001     # connections per worker: a thousand in a second, so that nobody can use workers as a hammer
CONNECT_BURST = 64

BUSY_SPREAD = 1.0       # the answers "busy" come within this time
BUSY_WORKERS = 10000    # in a room of up to so many about one is the first to speak
BUSY_ENOUGH = 5         # answers after which the submitter announces at once that it needs no more
BUSY_AGAIN = 5.0        # a submitter that has heard one asks again after this
BUSY_PAUSE = 4.0        # a worker answers one search at most so often
BUSY_GAP, BUSY_BURST = 0.1, 10      # and all searches together once in so long, after so many at once

AGAIN_FIRST = 0.02      # announcements: 20 ms, 40, 80 ... apart
AGAIN_MOST = 4.0        # a worker that starts now finds who waits within this; 100 waiting hosts send 25 a second
AGAIN_UNHEARD = 0.4     # as long as nobody at all has answered: a network may lose every other one
AGAIN_JITTER = 0.25
ALONE = 1.0             # when no worker has come for so long a search goes on as one for a single slot
HANDSHAKES = 4          # at once where so few are wanted: more would slow the first one
PATIENCE = 0.1          # a handshake older than this does not keep others from theirs
PATIENCE_MOST = 1.0     # one older than this makes room where there is none
CANDIDATES = 64         # connections that are kept at once, unless more are wanted
PER_ADDRESS = 4         # of these, unproven ones from one address: its holder must not keep all others out
WANTED_MOST = 64        # handshakes, and unproven ones from one address, however many are wanted
RANDOMS_MOST = 4096     # preambles remembered, so that no copy passes for another worker
PREFER_GAP = 0.1        # a connected worker that is cheaper by this is worth waiting for
PREFER_WAIT = 0.0015
TAKEN_AGAIN = (0.004, 0.008)    # before the hold runs out
CROWDED = 0.002         # more than two connections are too many: the offset rises by this, times the log of the ratio

HANDSHAKE, EVICT, WIN = "handshake", "evict", "win"     # what a Selection wants done, beside ANNOUNCE, HOLD and TAKEN


def clamp(value, low, high):
    """value between low and high; low for what is no number."""
    return min(value, high) if value >= low else low


class Origin(collections.namedtuple("Origin", "source port")):
    """Where an announcement came from.  source: as the kernel gives it, with the UDP port; port: TCP, to connect to."""
    __slots__ = ()
    address = property(lambda self: (self.source[0], self.port) + tuple(self.source[2:]), doc="As connect() wants it.")


class HeardSearch:
    """One search for workers as one worker remembers it, from its first announcement until it is forgotten."""
    __slots__ = ("nonce submitter since until sequence times_heard origin alternative connections refusals wanted "
                 "credit proven over learnt hold_sequence hold_end deferred base jitter cost delay fire queued "
                 "wants_busy wants_proof busy_at busy_told").split()

    def __init__(self, nonce, now, submitter=None):
        self.nonce, self.submitter, self.since = nonce, submitter, now
        self.sequence = -1                      # the highest of its announcements
        self.times_heard = 0                    # announcements with a new sequence number: copies hardly rise
        self.origin = self.alternative = None   # of the newest announcement; the last one from another address
        self.connections = self.refusals = 0
        self.wanted = 1                         # slots, by the newest announcement
        self.credit = 0                         # connections that may still be made for that announcement
        self.proven = False                     # a connection got its GO
        self.over = False                       # it gets no answer any more
        self.learnt = False                     # its new offset has been taken over
        self.hold_sequence, self.hold_end, self.deferred = -1, -math.inf, 0.0   # deferred: by all its holds
        self.fire = math.inf                    # when it is to be answered
        self.queued = False                     # that time has come, but no slot was free
        self.wants_busy = self.wants_proof = False      # its last announcement had TELL_BUSY, PROVE
        self.busy_at, self.busy_told = None, -math.inf      # when to say that this worker is busy, and when it did

    def heard_from(self, origin, new):
        """A copy arrives after the original, so the address first heard with a new sequence number is the
        submitter's."""
        elsewhere = self.origin and self.origin.source[0] != origin.source[0]
        if elsewhere:
            self.alternative = self.origin if new else origin
        if new:
            self.origin = origin

    def next_origin(self):
        """Every third connection tries the other address, for the first to be heard need not be one that can be
        reached."""
        self.connections += 1
        return self.alternative if self.alternative and self.connections % 3 == 0 else self.origin

    def most_connections(self):
        """How many at once may wait for their first job: a copy of an announcement costs one."""
        return self.wanted if self.proven else 1


class Responder:
    """When one worker offers a slot to which search.

    most, cores: slots, processors; speed: 1.0 is usual; uniform() returns a number in (0, 1];
    boost: a fixed delay in microseconds in place of the load rule.
    slots: those that are not free.  stopped: while it is set nobody is answered, as if all slots were taken.

    An offer reserves a slot for a second at most, and while others wait for less if its submitter has not shown yet
    that it is there: then the slot is offered to them as well, and whose GO comes first has it.
    """

    def __init__(self, most, cores, speed, uniform, boost=None):
        self.most, self.cores, self.speed, self.uniform, self.boost = most, cores, speed, uniform, boost
        self.slots = []
        self.stopped = False
        self.pending = collections.OrderedDict()    # {nonce: HeardSearch}, the least recently heard first
        self.answered = Recent(ANSWERED_MOST)       # those that have been, or need no answer
        self.silent = Recent(SILENT_MOST)           # {(address, port): when an offer to it lapsed}
        self.turns = 0                              # offers made while several waited
        self.offset = OFFSET_UNSET + PER_COST * math.log(speed)
        self.offset_high = self.offset_at = -math.inf
        self.outside, self.outside_at = 0.0, -math.inf      # so the first sample counts fully
        self.penalty_until = self.next_connect_at = self.next_busy_at = -math.inf

    def taken_slots(self):
        """How many belong to a submitter: those that were only offered do not."""
        return sum(slot.state not in PENCILLED for slot in self.slots)

    def is_full(self):
        """Whether there is nothing to offer."""
        return self.stopped or sum(slot.reserved for slot in self.slots) >= self.most

    def load(self, now, outside):
        """Take one sample, each second, of how many processes, the own jobs left out, want a processor."""
        blend = 1 - math.exp((self.outside_at - now) / LOAD_LAG)
        self.outside, self.outside_at = self.outside + blend * (clamp(outside, 0.0, 1e6) - self.outside), now
        self._forget_silent(now)

    def penalise(self, now, seconds):
        """Hold back for so long; 0 ends it."""
        self.penalty_until = now + seconds

    # -- what is heard
    def concerned(self, kind, nonce):
        """Whether a datagram can matter here: most are about jobs of others, and not worth an HMAC."""
        search = self._find(nonce)
        return nonce in self.pending if kind == HOLD else kind != TAKEN or search is None or not search.learnt

    def announced(self, now, nonce, source, announcement, sequence, port):
        """Heard an Announcement.  source: the address it came from, as the kernel gives it; port: TCP, to connect to.
        A copy with a sequence number that is not new can at most add an address to connect to."""
        search = self._find(nonce) or HeardSearch(nonce, now, announcement.submitter)
        new = sequence > search.sequence
        if port < PORT_LEAST or search.over or sequence < search.sequence:
            return
        search.heard_from(Origin(source, port), new)
        if not new:
            return
        search.sequence = sequence
        search.times_heard += 1
        search.wanted = search.credit = announcement.wanted
        search.until = now + FORGET * clamp(announcement.interval, *INTERVAL_RANGE)
        search.wants_busy = bool(announcement.flags & TELL_BUSY)
        search.wants_proof = bool(announcement.flags & PROVE)
        if nonce not in self.pending:
            if self._unserved(search) >= search.most_connections():
                return self._remember(search)
            self._make_room(now, source[0])
            self.answered.pop(nonce, None)
            self.pending[nonce] = search
            search.queued = False
            if now - self.offset_at > QUIET:
                self.offset = max(self.offset, self.offset_high - QUIET_REST)
            self._wait(now, now, search)
        self._plan_busy(now, search)
        self.pending.move_to_end(nonce)

    def hold(self, now, nonce, seconds, sequence):
        """Another worker has connected: answer so much later, if it is still needed then."""
        search = self.pending.get(nonce)
        if search is None or sequence <= search.hold_sequence:
            return
        search.hold_sequence, end = sequence, now + clamp(seconds, 0.0, HOLD_MOST)
        more = max(0.0, end - max(now, search.hold_end))
        if search.deferred + more > HOLD_MOST:
            return
        search.deferred, search.hold_end = search.deferred + more, max(end, search.hold_end)
        if search.queued:
            search.fire = end
        else:
            self._wait(now, end, search)

    def taken(self, now, nonce, offset):
        """The search needs no more workers; offset: the shared offset from now on, or None."""
        search = self._find(nonce) or HeardSearch(nonce, now)
        self.pending.pop(nonce, None)
        search.over = True
        if offset is not None and offset == offset and not search.learnt:
            search.learnt, self.offset = True, clamp(offset, *OFFSET_RANGE)
            above = max(0.0, self.offset_high - self.offset) * 2 ** ((self.offset_at - now) / HIGH_HALF_LIFE)
            self.offset_high, self.offset_at = self.offset + above, now
        self._remember(search)

    # -- offers
    def due(self, now):
        """The slots to offer now, each by a connection to its `origin`."""
        self._forget_silent(now)
        self.next_connect_at = max(self.next_connect_at, now - CONNECT_BURST * CONNECT_GAP)
        offers, fired = [], [search for search in self.pending.values() if search.fire <= now]
        while fired:
            if self.is_full():
                self._lapse(now)
            if self.is_full() or self.next_connect_at > now:
                break
            search = self._next_turn(now, fired)
            if search.queued or self._settled(now, search):
                offers.append(self._offer(now, search))
            if search.nonce not in self.pending or not search.fire <= now:
                fired.remove(search)
        if self.is_full():
            for search in fired:
                search.queued = True
                self._plan_busy(now, search)
        return offers

    def next_due(self):
        """When to ask due() and busy_due() again, or None."""
        full, times = self.is_full(), []
        for search in self.pending.values():
            if search.busy_at is not None:
                times.append(search.busy_at)
            if not (full and search.queued):
                times.append(max(search.fire, self.next_connect_at))
        if full and not self.stopped and self.waiting():
            times += [self._lapses_at(slot) for slot in self.slots if slot.reserved and slot.state in PENCILLED]
        return min(times, default=None)

    def surplus(self, now):
        """Offers to be withdrawn: the oldest of more than LAPSED_MOST that have lapsed, and those after a second whose
        submitter has been heard from another address since."""
        lapsed = [slot for slot in self.slots if slot.state in PENCILLED and not slot.reserved]
        return lapsed[:-LAPSED_MOST] + [slot for slot in lapsed[-LAPSED_MOST:] if (
            now - slot.since > OFFER_RESERVES and not slot.search.proven and self._has_moved(slot))]

    def show(self, now, search):
        """A Slot that is none: for a connection by which this worker, which has none free, shows that it is one."""
        slot = Slot(search, Answer(search.nonce, search.cost, self.offset, 0.0, True), search.next_origin(), now)
        slot.reserved = False
        self.slots.append(slot)
        return slot

    def _offer(self, now, search):
        waited = 0.0 if self.boost is not None else search.delay   # a fixed wait says nothing about the offset
        answer = Answer(search.nonce, search.cost, self.offset, waited, search.queued)
        slot = Slot(search, answer, search.next_origin(), now)
        self.slots.append(slot)
        search.busy_at = None
        search.credit -= 1
        self.next_connect_at += CONNECT_GAP
        if not search.credit or self._unserved(search) >= search.most_connections():
            del self.pending[search.nonce]
            self._remember(search)
        return slot

    def _next_turn(self, now, fired):
        """Who has fewest slots here, of these who has waited longest, and behind them those that were silent when they
        were called; but every third offer goes to who has waited longest, whoever that is."""
        self.turns += len(fired) > 1
        if self.turns % 3 == 0:
            return min(fired, key=lambda search: search.since)
        held = self.slots_by_submitter()
        return min(fired, key=lambda search: (self._was_silent(now, search), held[search.submitter], search.since))

    def _was_silent(self, now, search):
        origin = search.origin
        return now - self.silent.get((origin.source[0], origin.port), -math.inf) < SILENT_MARK

    def _lapses_at(self, slot):
        """When an offer reserves its slot no longer, while others wait."""
        if slot.search.proven:
            return slot.since + OFFER_RESERVES
        patience = SILENT_PATIENCE / (1 + sum(not each.reserved for each in self.slots))
        if slot.connected is None:
            return slot.since + patience
        return min(slot.since + OFFER_RESERVES, slot.connected + max(patience, 2 * (slot.connected - slot.since)))

    def _lapse(self, now):
        """Others wait: the offer that has been silent for longest lapses, if it is time."""
        offers = [slot for slot in self.slots if slot.reserved and slot.state in PENCILLED]
        slot = min(offers, key=self._lapses_at, default=None)
        if slot and self._lapses_at(slot) <= now:
            slot.reserved = False
            self.silent[slot.origin.source[0], slot.origin.port] = now

    # -- what becomes of a slot
    def connected(self, now, slot):
        slot.move(SlotEvent.CONNECTED)
        slot.connected = now

    def go(self, now, slot):
        """Its submitter has said GO.  Returns whether there is a slot for it; else it is the next to be called."""
        search = slot.search
        search.proven = True
        search.refusals = 0
        self.silent.pop((slot.origin.source[0], slot.origin.port), None)
        if self.taken_slots() >= self.most or self.stopped:
            self.move(now, slot, SlotEvent.LEAVE)
            if not search.over:
                self._call_again(search)
            return False
        slot.move(SlotEvent.GO)
        slot.reserved, slot.since = True, now
        if not search.over and search.credit and self._unserved(search) < search.wanted:
            self._call_again(search)
        return True

    def start(self, now, slot, job):
        """A job has come; job: a SlotJob."""
        slot.move(SlotEvent.JOB)
        if not slot.jobs:
            slot.since = slot.search.since = now    # for more slots the search has waited from now on only
        slot.job = job
        slot.jobs += 1
        if slot.search.wanted == 1:
            slot.search.over = True
            self.pending.pop(slot.search.nonce, None)
            self._remember(slot.search)

    def move(self, now, slot, event):
        """EXIT, LEAVE or STAY: the job has ended, no more are to come, or they may again."""
        slot.move(event)
        if slot.state is SlotState.FREE:
            self.slots.remove(slot)
            if not slot.jobs:
                self._came_to_nothing(slot)

    def turned_away(self, slot):
        """The search it was offered to will never take this worker; to be said before LEAVE."""
        slot.search.over = True
        self.pending.pop(slot.search.nonce, None)
        self._remember(slot.search)

    def refused(self, slot):
        """Nobody listens where it was offered; to be said before LEAVE.  Returns whether its submitter has refused
        before and so has not just taken another worker."""
        slot.search.refusals += slot.origin is not slot.search.alternative
        slot.search.over = slot.search.over or slot.search.refusals >= REFUSALS_MOST
        return slot.search.refusals > 1

    def _came_to_nothing(self, slot):
        """Without a job.  Its search may be answered again at its next announcement, for the submitter is still
        looking: at once if it has been heard from another address."""
        search = slot.search
        if self._has_moved(slot) and not search.over and search.nonce not in self.pending:
            self._call_again(search)
        elif search.nonce not in self.pending:
            search.credit = 0

    def _has_moved(self, slot):
        return slot.origin.source[0] != slot.search.origin.source[0]

    def _call_again(self, search):
        self.answered.pop(search.nonce, None)
        self.pending[search.nonce] = search
        search.credit = max(1, search.credit)
        search.fire, search.queued = -math.inf, True

    # -- who waits
    def waiting(self):
        """How many searches wait for a slot here."""
        return sum(search.queued for search in self.pending.values())

    def slots_by_submitter(self):
        """{submitter: slots that it has here}; those that were only offered count."""
        return collections.Counter(slot.search.submitter for slot in self.slots)

    def turns_over(self, now):
        """The slots whose submitters have had their turn, as many as others wait for who have fewer."""
        held = self.slots_by_submitter()
        ripe = sorted((slot for slot in self.slots if slot.state not in PENCILLED and now - slot.since > (
            TURN if slot.jobs else FIRST_JOB)), key=lambda slot: slot.since)
        over = []
        for search in sorted((each for each in self.pending.values() if each.queued), key=lambda each: each.since):
            for _ in range(min(search.wanted, len(ripe))):
                slot = max(ripe, key=lambda each: held[each.search.submitter])      # the longest turn of equals
                if held[slot.search.submitter] <= held[search.submitter]:
                    break
                ripe.remove(slot)
                over.append(slot)
                held[slot.search.submitter] -= 1
                held[search.submitter] += 1
        return over

    def busy_due(self, now):
        """The searches whose submitters are to hear now that this worker has no slot free."""
        self.next_busy_at = max(self.next_busy_at, now - BUSY_BURST * BUSY_GAP)
        told = []
        for search in self.pending.values():
            if search.busy_at is not None and search.busy_at <= now:
                search.busy_at = None
                if self.is_full() and self.next_busy_at <= now:
                    self.next_busy_at += BUSY_GAP
                    search.busy_told = now
                    told.append(search)
        return told

    def _plan_busy(self, now, search):
        """Of many workers only a few are to speak before the submitter has heard enough: waits are exponential, so
        that twice as many workers mean no more answers but an earlier first one."""
        if not search.wants_busy or not search.queued:
            search.busy_at = None
        elif search.busy_at is None and now - search.busy_told >= BUSY_PAUSE:
            search.busy_at = now + BUSY_SPREAD * max(0.0, 1 + math.log(self.uniform()) / math.log(BUSY_WORKERS))

    # -- the rule
    def cost(self, now):
        """What this worker is worth at the moment, as the preamble says it."""
        if self.boost is not None:
            return 0.0
        running = sum(slot.reserved for slot in self.slots)
        used = running * (1 / self.most + 1 / self.cores) / 2 + self.outside / self.cores
        return math.log((1 + used) / self.speed) + (PENALTY if now < self.penalty_until else 0.0)

    def _wait(self, now, base, search):
        """Set the timer: a fresh wait that begins at base."""
        search.base, search.jitter = base, JITTER * math.log(self.uniform())
        self._settled(now, search)

    def _settled(self, now, search):
        """The timer by load and offset as they are now.  False if it has to wait on: they may have risen meanwhile."""
        search.cost = self.cost(now)
        search.delay = (max(0.0, self.offset + PER_COST * search.cost + search.jitter) if self.boost is None
                        else self.boost / 1e6)
        search.fire = search.base + search.delay
        return search.fire <= now + SETTLED

    # -- what is remembered
    def _find(self, nonce):
        return self.pending.get(nonce) or self.answered.get(nonce) or next(
            (slot.search for slot in self.slots if slot.search.nonce == nonce), None)

    def _unserved(self, search):
        """How many connections it has here that wait for their first job."""
        return sum(slot.search is search and not slot.jobs for slot in self.slots)

    def _remember(self, search):
        if search.over:
            search.alternative = None
        self.answered[search.nonce] = search

    def _forget_silent(self, now):
        for search in [search for search in self.pending.values() if search.until <= now]:
            del self.pending[search.nonce]
            if search.connections:
                self._remember(search)      # its announcements so far have had their connection

    def _make_room(self, now, source):
        """Before one more search of this address: who is gone makes room, then of those heard once the oldest, which
        had its time to be heard again, and last the youngest of the others: copies cannot rise, and what they claim
        counts for nothing."""
        same = [search for search in self.pending.values() if search.origin.source[0] == source]
        crowd = same if len(same) >= PER_SOURCE else self.pending.values() if len(self.pending) >= PENDING_MOST else ()
        if crowd:
            last = min(crowd, key=lambda search: (search.until > now, search.times_heard > 1,
                                                  -search.since if search.times_heard > 1 else search.since))
            del self.pending[last.nonce]


class Candidate:
    """One worker that has connected.  began: when its handshake was started, or None."""
    __slots__ = ("who", "source", "cost", "offset", "waited", "queued", "began", "proven")

    def __init__(self, who, source, answer):
        self.who, self.source, self.queued = who, source, answer.queued
        self.cost = clamp(answer.cost, -20.0, 20.0)
        self.offset = clamp(answer.offset, *OFFSET_RANGE)
        self.waited = clamp(answer.waited, 0.0, 1.0)
        self.began, self.proven = None, False


class Selection:
    """Which of the workers that connect are taken, and what the cluster is told.

    wanted: how many slots the submitter can use.  Of one the best that comes first is taken; of more each worker that
    has proven itself, until enough have come, or none for a second: then the search is over, or, where it has found
    nobody at all, goes on as one for a single slot.
    Call poll() after every event and when next_due() has come, also for a while after the end."""

    def __init__(self, now, uniform, wanted=1):
        self.uniform, self.since = uniform, now
        self.attempt, self.again = 0, now
        self.announced_at = now
        self.wanted = wanted
        self.announced = 0                      # what was said to be wanted last
        self.most_wanted = wanted               # and at any time
        self.fresh = now                        # when a worker came last
        self.alone = False                      # whether that is too long ago to look for more than one
        self.candidates, self.connections = {}, 0       # {who: Candidate}, in the order of arrival; of all that came
        self.taken = None                       # the Candidate that was taken last
        self.over = False
        self.choose_by = math.inf
        self.randoms = Recent(RANDOMS_MOST)
        self.spoke, self.repeats = -math.inf, []        # when the cluster was told last; when the end is told again
        self.actions = []
        self.answered = False                   # whether anybody has
        self.asking = True                      # whether announcements ask busy workers to say so
        self.busy_heard = 0                     # answers since then; when the first and the last one came
        self.busy_first = self.busy_last = -math.inf

    def connected(self, now, who, source, answer, random):
        """A worker has connected from this address; answer and random are those of its preamble."""
        if random in self.randoms:
            return self.actions.append((EVICT, who, "a copy of another worker's first bytes"))
        self.randoms[random] = None
        self.connections += 1
        self.answered, self.fresh = True, now
        if not self.over and self._admits(now, source):
            self.candidates[who] = Candidate(who, source, answer)
        else:
            self.actions.append((EVICT, who, "slower than another" if self.over else
                                 "too many others from its address"))
        if now - self.spoke >= SPEAK_GAP and len(self.candidates) >= self.wanted:
            self._speak(now)

    def authenticated(self, now, who):
        """The handshake is done and the worker is one of ours."""
        if who in self.candidates:
            self.candidates[who].proven = True
            self.choose_by = min(self.choose_by, now + PREFER_WAIT)

    def closed(self, now, who):
        """The connection is gone, whoever ended it."""
        self.candidates.pop(who, None)

    def busy(self, now):
        """A worker has said that it is there but cannot serve now.  Enough such answers are stopped at once."""
        self.answered = True
        self.busy_first, self.busy_last = self.busy_first if self.busy_heard else now, now
        self.busy_heard += 1
        if self.busy_heard % BUSY_ENOUGH == 0:
            self.announce_soon(now)

    def announce_soon(self, now):
        """Announce at once instead of when the timetable says."""
        self.again = now

    def poll(self, now, wanted=1):
        """What to do now, in this order; each is one of (ANNOUNCE, attempt, waited, interval, flags, wanted),
        (HOLD, seconds), (TAKEN, offset or None), (HANDSHAKE, who), (EVICT, who, why), (WIN, who).

        wanted: how many slots the submitter can use now, those of an earlier WIN not counted.
        """
        if self.over:
            if self.repeats and self.repeats[0] <= now:
                self.repeats.pop(0)
                self._speak(now)
        else:
            self._want(now, wanted)
            if not self.over:
                self._choose(now)
            if not self.over:
                self._start_handshakes(now)
                self._announce(now)
        actions, self.actions = self.actions, []
        return actions

    def next_due(self):
        """When to call poll() again, or None."""
        if self.actions or self.over:
            return self.since if self.actions else min(self.repeats, default=None)
        if not self.wanted:
            return None
        times = [self.again] + ([self.fresh + ALONE] if self.taken else [])
        if any(candidate.proven for candidate in self.candidates.values()):
            times.append(self.choose_by)
        shaking = self._shaking()
        if self._next_to_shake() and len(shaking) >= self._at_once():
            times.append(shaking[-self._at_once()].began + PATIENCE)
        return min(times)

    # -- how many
    def _want(self, now, wanted):
        if not self.alone and now >= self.fresh + ALONE:
            self.alone = True
            if self.taken:
                return self._finish(now)
        self.wanted = min(wanted, 1) if self.alone else wanted
        self.most_wanted = max(self.most_wanted, self.wanted)
        if self.wanted > max(1, self.announced):        # so many more may come
            self.again = min(self.again, max(now, self.announced_at + AGAIN_FIRST))

    def _at_once(self):
        """How many handshakes may be under way: more than are wanted would slow the first ones."""
        return clamp(self.wanted, HANDSHAKES, WANTED_MOST)

    def _announce(self, now):
        if self.again > now or not self.wanted:
            return
        spread = 1 + AGAIN_JITTER * (2 * self.uniform() - 1)
        most = AGAIN_MOST if self.answered else AGAIN_UNHEARD
        interval = spread * min(most, AGAIN_FIRST * 2 ** min(self.attempt, 20))
        self.announced = self.wanted
        self.actions.append((ANNOUNCE, self.attempt, now - self.since, interval, self._flags(now), self.wanted))
        self.attempt, self.again, self.announced_at = self.attempt + 1, now + interval, now

    def _choose(self, now):
        proven = sorted((candidate for candidate in self.candidates.values() if candidate.proven),
                        key=lambda candidate: candidate.cost)
        if proven and self.wanted == 1 and now < self.choose_by and any(
                other.began is not None and other.cost < proven[0].cost - PREFER_GAP
                for other in self.candidates.values()):
            return      # a cheaper one is about to prove itself
        chosen = proven[:self.wanted]
        self.wanted -= len(chosen)
        for candidate in chosen:
            del self.candidates[candidate.who]
            self.taken = candidate
        # Workers take a search that has said that it wants one to be over when that one has its job.
        if chosen and (not self.wanted or self.announced <= 1):
            self._finish(now, chosen)
        else:
            self.actions.extend((WIN, candidate.who) for candidate in chosen)

    def _finish(self, now, chosen=()):
        """No more than these are wanted, or the next ones need a search of their own."""
        self.over = True
        self._speak(now)
        self.repeats = [now + later for later in TAKEN_AGAIN]
        self.actions.extend((WIN, candidate.who) for candidate in chosen)
        self.actions.extend((EVICT, who, "slower than another") for who in self.candidates)
        self.candidates = {}

    def _speak(self, now):
        self.spoke = now
        self.actions.append((TAKEN, self._offset()) if self.over else (HOLD, HOLD_TIME))

    def _offset(self):
        """The offset for the next job: down by half of what the worker taken waited, never so far that idler workers
        would all fire at once, and up when many connected.  One from a queue tells nothing, nor do several."""
        best = self.taken
        if best.queued or self.most_wanted > 1:
            return None
        return (max(best.offset - best.waited / 2, -PER_COST * best.cost)
                + CROWDED * max(0.0, math.log(self.connections / 2)))

    # -- whose turn it is
    def _admits(self, now, source):
        """Whether one more from this address may stay.  Where there are too many, one goes whose handshake has stalled,
        or the last one of the address that has most of them."""
        unproven = [candidate for candidate in self.candidates.values() if not candidate.proven]
        crowd = collections.Counter(candidate.source for candidate in unproven)
        stalled = [candidate for candidate in unproven
                   if candidate.began is not None and now - candidate.began > PATIENCE_MOST]
        if crowd[source] >= clamp(self.wanted, PER_ADDRESS, WANTED_MOST):
            victim = next((candidate for candidate in stalled if candidate.source == source), None)
        elif len(self.candidates) < max(CANDIDATES, self.wanted):
            return True
        else:
            worst = max(reversed(unproven), key=lambda candidate: crowd[candidate.source], default=None)
            victim = stalled[0] if stalled else worst if worst and crowd[worst.source] > crowd[source] + 1 else None
        if victim is None:
            return False
        del self.candidates[victim.who]
        self.actions.append((EVICT, victim.who, "too many others from its address"))
        return True

    def _shaking(self):
        """The handshakes under way, the oldest first."""
        return sorted((candidate for candidate in self.candidates.values()
                       if candidate.began is not None and not candidate.proven), key=lambda candidate: candidate.began)

    def _next_to_shake(self):
        """Whose handshake comes next: addresses take turns."""
        waiting = [candidate for candidate in self.candidates.values() if candidate.began is None]
        at_it = collections.Counter(candidate.source for candidate in self._shaking()) if waiting else {}
        return min(waiting, default=None, key=lambda candidate: at_it[candidate.source])

    def _start_handshakes(self, now):
        """A few at once; one that has stalled does not count any more, and may still be the first."""
        while self.wanted and self._at_once() > sum(        # in the very sum that next_due() tells
                now < candidate.began + PATIENCE for candidate in self._shaking()):
            candidate = self._next_to_shake()
            if candidate is None:
                return
            candidate.began = now
            self.actions.append((HANDSHAKE, candidate.who))

    def _flags(self, now):
        """TELL_BUSY, until enough have answered or the time for answers is over; and again some seconds later."""
        if self.asking:
            self.asking = not self.busy_heard or self.busy_heard < BUSY_ENOUGH and now - self.busy_first <= BUSY_SPREAD
        elif now - self.busy_last >= BUSY_AGAIN:
            self.asking, self.busy_heard = True, 0
        return TELL_BUSY if self.asking else 0


# ---------------------------------------------------------------- batch: many jobs, one result
#
# What becomes of many jobs that a Pool runs, as far as no clock, worker or descriptor is needed to say so.  cmap,
# Room.map and the Executor tell it what happens to their jobs; it says whether another one is wanted, where one may
# run, whether what a run came to counts, and what is to be delivered next.

CHANCE = 0.001              # failures in a row that are less likely than this are the worker's
ROW = 3                     # failures in a row from which on a worker is looked at
TRIAL_FIRST, TRIAL_MOST = 1.0, 60.0     # seconds from one trial of a worker that fails to the next
ELSEWHERE = 10.0            # seconds for which a job that failed waits for another worker to join
HELD_BACK_MAX = 1000        # jobs that may wait so beside those that run
UNDELIVERED_MAX = 10000     # jobs that may run, or have ended before an earlier one

NEW, GOING, DONE_WITH, DELIVERED = "new", "going", "done with", "delivered"
START, SETTLE, DELIVER = "start", "settle", "deliver"
BATCH_JOB = {
    (NEW, START): GOING,
    (NEW, SETTLE): DONE_WITH,       # an input of no use, or done before
    (GOING, START): GOING,          # again, or a second time elsewhere
    (GOING, SETTLE): DONE_WITH,
    (DONE_WITH, DELIVER): DELIVERED,
}

TAKING, COMPLETE, STOPPING = "taking", "complete", "stopping"      # whether a Batch takes further jobs; why not
# What became of a run.  LOST: the cluster's or the input's fault.  NOT_TAKEN: every worker refuses it for good.
SUCCEEDED, FAILED, LOST, NOT_TAKEN = "succeeded", "failed", "lost", "not taken"
AGAIN, WAIT, COUNTS = "again", "wait", "counts"                 # what is to be done when a run has ended

TRUSTED, SUSPECT, DISTRUSTED = "trusted", "suspect", "distrusted"


class BatchJob:
    """One job, numbered by the Batch from 1.  runs: those under way, whatever the owner takes for one."""
    __slots__ = ("number", "state", "runs", "tries", "twins", "failed_on", "failed_at")

    def __init__(self):
        self.number = 0
        self.state = NEW
        self.runs = []
        self.tries = 0              # how often it ran again because it had failed
        self.twins = 0              # runs started beside another one
        self.failed_on = set()      # the instances of the workers it failed on
        self.failed_at = -math.inf

    def happens(self, event):
        self.state = next_state(BATCH_JOB, self.state, event, "job %d" % self.number)


class WorkerRecord:
    """How one worker has fared."""
    __slots__ = ("name", "ended", "failed", "row", "before", "trial_at", "trial_wait", "told")

    def __init__(self, name):
        self.name = name
        self.ended = 0
        self.failed = 0
        self.row = 0                # failures since the last success
        self.before = 0, 0          # what had ended and failed elsewhere when the row began
        self.trial_at = -math.inf
        self.trial_wait = TRIAL_FIRST
        self.told = False


class WorkerRecords:
    """Which workers fail though the jobs are good: a machine without a licence would otherwise get most jobs, since it
    ends them soonest.

    A worker with k failures in a row, while elsewhere f of n jobs failed, is distrusted where ((f+1)/(n+2))^k is less
    than CHANCE, and gets a trial now and then.  One that has only failed, or whose row is so long that this is so
    without a word from the others, is suspect: it waits for that word.  What counts elsewhere is what has ended since
    the row began, so a stretch of bad inputs, which fail everywhere, makes nobody suspect for long.
    """

    def __init__(self):
        self.records = {}           # {instance: WorkerRecord}
        self.ended = 0
        self.failed = 0

    def add(self, instance, name, failed, now):
        """A job has ended there.  Returns a line for the user when that makes the worker distrusted, once, or None."""
        record = self.records.setdefault(instance, WorkerRecord(name))
        if failed and not record.row:
            record.before = self.ended - record.ended, self.failed - record.failed
        trial = self._trust(record) is DISTRUSTED and now >= record.trial_at
        for counts in self, record:
            counts.ended += 1
            counts.failed += failed
        record.row = record.row + 1 if failed else 0
        if self._trust(record) is not DISTRUSTED:
            record.trial_wait = TRIAL_FIRST
            return None
        if trial:
            record.trial_wait = min(2 * record.trial_wait, TRIAL_MOST)
        if trial or record.trial_at < now:
            record.trial_at = now + record.trial_wait
        if record.told:
            return None
        record.told = True
        return "worker %s: %s failed there in a row, and elsewhere %d of %d: it gets only a trial now and then" % (
            name, count_text(record.row, "job"), *reversed(self._elsewhere(record)))

    def _elsewhere(self, record):
        """(jobs ended, jobs failed) on the others since its row of failures began"""
        return (self.ended - record.ended - record.before[0], self.failed - record.failed - record.before[1])

    def _trust(self, record):
        if record.row < ROW:
            return TRUSTED
        ended, failed = self._elsewhere(record)
        if ((failed + 1) / (ended + 2)) ** record.row < CHANCE:
            return DISTRUSTED if ended else SUSPECT
        told = ended and 2 * failed >= ended or (1 / (ended + 2)) ** record.row < CHANCE
        return SUSPECT if record.failed == record.ended and not told else TRUSTED

    def trusts(self, instance):
        return instance not in self.records or self._trust(self.records[instance]) is TRUSTED

    def may_have(self, instance, now, working):
        """Whether this worker may have a job now.  working(): the instances of those that run one."""
        record = self.records.get(instance)
        trust = self._trust(record) if record else TRUSTED
        return (trust is TRUSTED or trust is SUSPECT and not working() - {instance} or
                trust is DISTRUSTED and now >= record.trial_at and instance not in working())

    def spread_text(self):
        """Which workers had the failures, where they are not spread; else nothing."""
        names = {}
        for record in self.records.values():
            failed, ended = names.get(record.name, (0, 0))
            names[record.name] = failed + record.failed, ended + record.ended
        worst = sorted(((failed, ended, name) for name, (failed, ended) in names.items() if failed), reverse=True)
        if len(names) < 2 or not worst or 2 * worst[0][0] <= self.failed or self.failed < 2:
            return ""
        return ", ".join("%d of %d on %s" % (failed, ended, name) for failed, ended, name in worst[:3])


class Batch:
    """Many jobs in order.

    most: how many may run at once.  undelivered: how many may be there that have not been delivered, those that run
    among them.  again: how often a job that failed is run again, elsewhere where that can be.
    halt: whether a failure that counts lets no further job begin.  ordered: whether jobs are delivered in their order
    or as they end.  working(), serving(): the instances of the workers that run a job, and of those that could.
    """

    def __init__(self, most, again=0, halt=False, ordered=True, working=set, serving=set):
        self.most = most
        self.undelivered = UNDELIVERED_MAX
        self.again = again
        self.halt = halt
        self.ordered = ordered
        self.working = working
        self.serving = serving
        self.state = TAKING
        self.workers = WorkerRecords()
        self.jobs = {}              # {number: BatchJob} of those not delivered
        self.taken = 0
        self.going = 0

    # -- jobs that come in
    def wants_job(self, held_back=0):
        """Whether there is room for one more.  held_back: how many of those that go wait for another worker."""
        return (self.state is TAKING and self.going - held_back < self.most and held_back < HELD_BACK_MAX
                and len(self.jobs) < self.undelivered)

    def add(self, job):
        """The next one."""
        self.taken += 1
        job.number = self.taken
        self.jobs[job.number] = job

    def complete(self):
        """There are no further ones."""
        if self.state is TAKING:
            self.state = COMPLETE

    def stop(self):
        """None is to begin any more, and none to run again."""
        self.state = STOPPING

    # -- runs
    def start(self, job, run):
        """A run of it is on its way to a worker."""
        self.going += job.state is NEW
        job.happens(START)
        job.twins += bool(job.runs)
        job.runs.append(run)

    def may_run(self, job, instance, now):
        """Whether a run of the job may have this worker: one that may have jobs at all, and is, for a job that has
        failed, another one, as long as there is one or one may join."""
        if not self.workers.may_have(instance, now, self.working):
            return False
        return instance not in job.failed_on or now >= job.failed_at + ELSEWHERE and not any(
            each not in job.failed_on and self.workers.trusts(each) for each in self.serving())

    def ended(self, job, run, outcome, instance, now):
        """A run has ended.  AGAIN: the job is to be started again; WAIT: its other run decides; COUNTS: that was it."""
        job.runs.remove(run)
        if outcome is FAILED:
            job.failed_on.add(instance)
            job.failed_at = now
        if outcome is not SUCCEEDED and job.runs:
            return WAIT
        if outcome is FAILED and job.tries < self.again and self.state is not STOPPING:
            job.tries += 1
            job.twins = 0
            return AGAIN
        return COUNTS

    def forget(self, job, run):
        """A run is as if it had never been."""
        job.runs.remove(run)

    def twin_wanted(self, began_at):
        """The job that is to be started a second time, once all have begun: the one that has run for longest and has
        had no twin; None where there is none.  began_at(run): when it started on its worker, or None."""
        alone = [(began_at(job.runs[0]), job.number) for job in self.jobs.values()
                 if len(job.runs) == 1 and not job.twins and began_at(job.runs[0]) is not None
                 ] if self.state is COMPLETE else ()
        return self.jobs[min(alone)[1]] if alone else None

    # -- ends
    def settle(self, job, failed=False):
        """It is over.  Runs that are left are the owner's to end."""
        self.going -= job.state is GOING
        job.happens(SETTLE)
        if failed and self.halt:
            self.stop()

    def first(self):
        """The first job of those not delivered, or None."""
        return next(iter(self.jobs.values()), None)

    def has_ready(self):
        """Whether there is something to be delivered in order."""
        return bool(self.jobs) and self.first().state is DONE_WITH

    def deliverable(self, ended=None):
        """The jobs that are to be delivered now that this one has ended, in their order."""
        while self.jobs:
            first = self.first() if self.ordered else ended
            if first.state is not DONE_WITH:
                break
            del self.jobs[first.number]
            first.happens(DELIVER)
            yield first

    def unfinished(self):
        """The jobs that go, in their order."""
        return [job for job in self.jobs.values() if job.state is GOING]

    def is_over(self):
        return self.state is not TAKING and not self.going


# ================================================================ below this line the program touches the world

# ---------------------------------------------------------------- TLS

NO_CHANNEL = "no encrypted channel can be made on this machine"


def tls_context(key, server_side):
    """TLS 1.3 (RFC 8446) only, both sides with a certificate, trusting nobody but the key's other half."""
    global ssl
    import ssl
    if not ssl.HAS_TLSv1_3:
        raise Failure(NO_CHANNEL, "this Python has %s, without TLS 1.3" % ssl.OPENSSL_VERSION,
                      "take a Python with OpenSSL 1.1.1 or later; on a Mac that of python.org or Homebrew", EXIT_USAGE)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server_side else ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False      # names mean nothing here: the certificate itself is pinned
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        load_own_half(context, key)
        context.load_verify_locations(cadata=key.peer_pem)
    except (ValueError, ssl.SSLError, OSError) as error:
        raise Failure(key.path, "no TLS 1.3 channel can be made of it: %s" % reason_of(error),
                      "either the file is damaged or this machine's policy forbids TLS 1.3 or P-256") from None
    if server_side:
        context.num_tickets = 0         # a ticket that crosses a close resets the connection and loses its tail
    return context


def load_own_half(context, key):
    """Gives the context this half of the key.  OpenSSL reads it from a file only."""
    if key.text is None:
        return context.load_cert_chain(key.path)
    place = None
    try:
        fd = os.memfd_create("key")
    except (AttributeError, OSError):       # not Linux, or not allowed
        place = os.path.join(os.environ.get("TMPDIR") or "/tmp", ".cexec-" + os.urandom(8).hex())
        fd = os.open(place, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, key.text)
        context.load_cert_chain(place or "/proc/self/fd/%d" % fd)
    finally:
        os.close(fd)
        if place:
            os.unlink(place)


class TlsConnection:
    """TLS over a TCP socket that never blocks.  TLS works on two memory buffers, so that one call to the system moves
    many records where an SSLSocket needs two calls for each.

    Errors are OSErrors (ssl.SSLError is one); loss_of() says what they mean.  Wait for the socket to become readable,
    and writable while flush() returns False.  Whoever has it last calls close(), which may be repeated.
    """
    FETCHES = 4             # reads from the socket per call: a peer may send records without anything in them

    def __init__(self, connection, context, server_side):
        connection.setblocking(False)
        self.socket = connection
        self.encrypted, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.encrypted, self.outgoing, server_side)
        self.buffer = memoryview(bytearray(BUFFER_START))
        self.unsent = memoryview(b"")       # encrypted, and not taken by the system yet
        self.emptied = False                # the last read from the socket was short: asking again would be in vain
        self.barren = 0                     # bytes from the socket behind the last data
        self.failure = None                 # what ended the connection behind the bytes that were returned last

    def fileno(self):
        return self.socket.fileno()

    def handshake(self):
        """Goes on with the handshake as far as the peer has; returns whether it is done."""
        for _ in range(self.FETCHES):
            try:
                self.tls.do_handshake()
                return self.flush()
            except ssl.SSLWantReadError:
                self.flush()
                if not self._fetch():
                    break
            except ssl.SSLError:
                try:
                    self.flush()        # the alert tells the peer why
                except OSError:
                    pass                # which has gone
                raise
        return False

    def read_into(self, view):
        """Returns how many bytes were read, 0 when the peer has ended the connection, or None when there is nothing
        now.  Fewer than the view holds means that there is no more now, unless `failure` is set, or that the socket
        will be readable again at once."""
        filled = fetches = 0
        try:
            while filled < len(view):
                if self.failure:
                    raise self.failure
                try:
                    size = self.tls.read(len(view) - filled, view[filled:])
                except ssl.SSLWantReadError:
                    fetches += 1
                    if fetches > self.FETCHES or not self._fetch():
                        return filled or None
                    continue
                if not size:
                    break
                filled += size
                self.barren = self.encrypted.pending
        except ssl.SSLZeroReturnError:
            pass
        except OSError as error:
            self.failure = error
            if not filled:
                raise
        return filled

    def _fetch(self):
        """Moves bytes from the socket to TLS; returns whether there were any, or the end."""
        if self.emptied:
            self.emptied = False
            return False
        if self.outgoing.pending > TLS_PIECE:       # what was to be sent is in `unsent`
            raise OSError(errno.EPROTO, "it keeps TLS busy without reading the answers")
        if self.barren > BARREN_MAX:
            raise OSError(errno.EPROTO, "it keeps TLS busy and sends no data")
        try:
            size = self.socket.recv_into(self.buffer)
        except BlockingIOError:
            return False
        if size:
            self.encrypted.write(self.buffer[:size])
            self.barren += size
            self.emptied = size < len(self.buffer)
            if size == len(self.buffer) == BUFFER_START:
                self.buffer = memoryview(bytearray(BUFFER + RECORD))    # sixteen records with their heads and tags fit
        else:
            self.encrypted.write_eof()
        return True

    def send(self, view):
        """Takes all of the view, at most TLS_PIECE; returns whether the system has taken it too.  To be called only
        when it has taken all before."""
        while view:
            view = view[self.tls.write(view):]
        return self.flush()

    def flush(self):
        """Sends what TLS has made; returns whether the system has taken all of it."""
        while self.unsent or self.outgoing.pending:
            if not self.unsent:
                self.unsent = memoryview(self.outgoing.read())
            try:
                self.unsent = self.unsent[self.socket.send(self.unsent):]
            except BlockingIOError:
                return False
        return True

    def close(self):
        """The end without a word: the session's own messages have said whether anything is missing."""
        self.socket.close()


def check_peer(tls, key):
    """ssl.SSLError unless the finished handshake is TLS 1.3 with exactly the pinned certificate."""
    if tls.version() != "TLSv1.3" or tls.getpeercert(True) != key.peer_der:
        raise ssl.SSLError("the peer shows another certificate")


# Why a connection was lost: the peer ended it, the system or TLS failed, nothing was heard for too long, or the peer
# broke the protocol.
CLOSED, BROKEN, SILENT, PROTOCOL = "closed", "broken", "silent", "protocol"
Loss = collections.namedtuple("Loss", "kind words")


def loss_of(error):
    """The Loss that an error of a TlsConnection means."""
    if ssl and (isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError))
                or getattr(error, "reason", "") == "UNEXPECTED_EOF_WHILE_READING"):    # Python 3.8 on OpenSSL 3
        return Loss(CLOSED, "the connection was closed")
    if hasattr(error, "library"):       # an ssl.SSLError
        return Loss(BROKEN, "the channel broke: %s" % (error.reason or reason_of(error)).lower().replace("_", " "))
    return Loss(BROKEN, "the connection broke: %s" % reason_of(error))


def check_tls():
    """Failure unless the channel's handshake works on this machine: done here in memory, between the halves of a key
    made for it.  A policy that forbids it would else show at the first job only, and as a fault of the other side."""
    global ssl
    import ssl
    halves = []
    for text in make_keypair(os.urandom(32)):
        halves.append(parse_key(text, "a key for this"))
        halves[-1].text = text
    try:
        client, server = tls_context(halves[0], server_side=False), tls_context(halves[1], server_side=True)
        up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
        waiting = list(zip((client.wrap_bio(down, up), server.wrap_bio(up, down, server_side=True)), halves))
        for connection, key in waiting * 4:     # each turn of the two is a round trip
            try:
                connection.do_handshake()
            except ssl.SSLWantReadError:
                pass
        for connection, key in waiting:
            check_peer(connection, key)
    except (ssl.SSLError, Failure) as error:
        if not ssl.HAS_TLSv1_3:
            raise
        raise Failure(NO_CHANNEL, getattr(error, "why", "") or reason_of(error),
                      "it needs TLS 1.3 with signatures of P-256, which OpenSSL's configuration forbids here "
                      "(MaxProtocol, SignatureAlgorithms, Ciphersuites; %s)" % ssl.OPENSSL_VERSION,
                      EXIT_USAGE) from None
    except OSError:
        pass        # there is no place for the halves, which OpenSSL reads from files; the first job will show


def tune(connection):
    """Small messages go at once; a peer whose machine has gone is noticed in two minutes though it may be silent."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if MACOS:
        connection.setsockopt(socket.IPPROTO_TCP, 0x10, 60)     # TCP_KEEPALIVE, what others call TCP_KEEPIDLE
    for name, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4)):
        if name in vars(socket):
            connection.setsockopt(socket.IPPROTO_TCP, vars(socket)[name], value)


# ---------------------------------------------------------------- log: what the tools that keep running say

NOTE_PAUSE = 10.0           # seconds between two notes on one topic: strangers must not fill a log
TOPICS_MAX = 1000           # topics remembered; an address may be part of one, and strangers have many


def has_room():
    """Whether a line can be written to standard error without waiting for who reads it."""
    try:
        return bool(select.select([], [2], [], 0)[1])
    except OSError:
        return False        # it is closed


def is_journal():
    """Whether standard error is the journal of the service manager that started this."""
    try:
        status = os.fstat(2)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == "%d:%d" % (status.st_dev, status.st_ino)


class TokenBucket:
    """So many a second on average, so many at once."""
    __slots__ = ("rate", "burst", "left", "when")

    def __init__(self, rate, burst):
        self.rate, self.burst, self.left, self.when = rate, burst, burst, 0.0

    def take(self, now):
        """Whether one more is allowed now, and counts it."""
        self.left = min(self.burst, self.left + max(0, now - self.when) * self.rate)
        self.when = now
        if self.left < 1:
            return False
        self.left -= 1
        return True


class Log:
    """Lines on standard error with time and tool, which never block and never flood; no time where a service manager's
    journal has its own.

    Lines beyond BURST and PER_SECOND are dropped and counted, and so is what would have to wait for a slow reader.
    note() is for what strangers can cause: of each topic the first at once, then one in NOTE_PAUSE with their number.
    """
    BURST, PER_SECOND = 200, 50

    def __init__(self, tool, clock=time.monotonic, file=None):
        self.tool, self.clock, self.file = tool, clock, file
        self.timed = not is_journal()
        self.bucket = TokenBucket(self.PER_SECOND, self.BURST)
        self.dropped = 0        # lines since the last one that was written
        self.topics = Recent(TOPICS_MAX)    # {topic: (when it was noted, how many have not been since)}
        self.lost = 0           # datagrams, as told to datagrams_lost()

    def __call__(self, text, always=False):
        if not (self.bucket.take(self.clock()) or always) or not has_room() or self.file and not self.file.has_room():
            self.dropped += 1
            return
        if self.dropped:
            text, self.dropped = "%s (%d lines before this one were dropped)" % (text, self.dropped), 0
        moment = time.strftime("%Y-%m-%dT%H:%M:%S ") if self.timed else ""
        for fd in {2, self.file.fd} if self.file else {2}:
            say(moment + self.tool, text[:2000], fd)

    def settle(self):
        """The tool is ready: from here on its lines go to its file alone, if it has one."""
        if self.file:
            self.file.take_over()
            self.timed = True

    def fault(self, error):
        """An error of our own in a callback: it costs what was in hand, and the tool goes on."""
        import traceback
        self.note(repr(error), "internal error, the daemon goes on: " + " | ".join(
            traceback.format_exc().strip().splitlines()))

    def note(self, topic, text):
        now = self.clock()
        when, held = self.topics.get(topic, (-NOTE_PAUSE, 0))
        if now - when < NOTE_PAUSE:
            self.topics[topic] = when, held + 1
            return
        self.topics[topic] = now, 0
        self(text + (" (and %d more such since the last note)" % held if held else ""))

    def datagrams_lost(self, count):
        """Notes what the system has thrown away, `count` so far, of what should have been heard."""
        if count != self.lost:
            self.note("lost", "%d datagrams lost, this machine is too busy" % (count - self.lost))
            self.lost = count


# ---------------------------------------------------------------- loop

class Timer:
    """One call in the future; cancel() is for ever and may be repeated."""
    __slots__ = ("when", "callback")

    def __init__(self, when, callback):
        self.when, self.callback = when, callback

    def __lt__(self, other):
        return self.when < other.when

    def cancel(self):
        self.callback = None


NO_TIMER = Timer(math.inf, None)        # what there is to cancel before the first one is set


class Loop:
    """Descriptors, timers, signals and wake-ups from threads, as calls in one thread.  Times are monotonic seconds.

    select rather than epoll: it waits for microseconds where the others round up to milliseconds, leaves no state in
    the kernel that a forked child would share, and macOS can wait for terminals with nothing else.  The first
    descriptor that is too high for it changes the loop to poll.

    on_error(exception) hears what a call raises, and the loop goes on; without it the exception leaves run(), as a
    Failure always does.  Signals, which only the main thread can have, are touched when one is asked for.
    """

    def __init__(self, on_error=None):
        self.on_error = on_error
        self.reads, self.writes = {}, {}        # {descriptor: what to call}
        self.poll = None                        # once it is needed
        self.timers, self.timers_most = [], 1000
        self.calls = collections.deque()
        self.signals, self.old_handlers, self.old_wakeup = {}, {}, None
        self.result, self.running = None, True
        self.thread = _thread.get_ident()       # where it runs
        self.wake_in, self.wake_out = os.pipe()
        os.set_blocking(self.wake_in, False)
        os.set_blocking(self.wake_out, False)
        self.watch(self.wake_in, read=self._woken)

    # -- what to wait for
    def watch(self, fd, read=None, write=None):
        """Calls read() or write() whenever fd is ready for it; None stops that direction, both None forget fd."""
        if fd < 0:
            return              # a socket that has been closed already
        for calls, call in (self.reads, read), (self.writes, write):
            if call:
                calls[fd] = call
            else:
                calls.pop(fd, None)
        if self.poll:
            self._register(fd)
        elif fd >= FD_SETSIZE and (read or write):
            self.poll = select.poll()
            for each in set(self.reads).union(self.writes):
                self._register(each)

    def _register(self, fd):
        events = (select.POLLIN if fd in self.reads else 0) | (select.POLLOUT if fd in self.writes else 0)
        self.poll.register(fd, events)
        if not events:
            self.poll.unregister(fd)

    def call_at(self, when, callback):
        timer = Timer(when, callback)
        if len(self.timers) >= self.timers_most:        # cancelled ones are not to gather until their time comes
            self.timers = [each for each in self.timers if each.callback]
            heapq.heapify(self.timers)
            self.timers_most = max(1000, 2 * len(self.timers))
        heapq.heappush(self.timers, timer)
        return timer

    def call_later(self, seconds, callback):
        return self.call_at(time.monotonic() + seconds, callback)

    def call_every(self, seconds, callback):
        """Calls again and again, whatever one call raises."""
        def call():
            self.call_later(seconds, call)
            callback()
        self.call_later(seconds, call)

    def on_signal(self, number, callback):
        """callback(number) in the loop for every delivery of the signal; None restores what was there before."""
        if callback is None:
            self.signals.pop(number, None)
            if number in self.old_handlers:
                signal.signal(number, self.old_handlers.pop(number))
            return
        if self.old_wakeup is None:
            self.old_wakeup = signal.set_wakeup_fd(self.wake_out, warn_on_full_buffer=False)
        if number not in self.signals:
            self.old_handlers[number] = signal.getsignal(number) or signal.SIG_DFL
        self.signals[number] = callback
        signal.signal(number, self._signalled)

    def on_signal_unless_ignored(self, number, callback):
        """As on_signal, unless the signal has been ignored from the start: nohup and the shells mean that."""
        if signal.getsignal(number) is not signal.SIG_IGN:
            self.on_signal(number, callback)

    def _signalled(self, number, frame):
        self.calls.append(lambda: self.signals[number](number) if number in self.signals else None)

    def call_soon_threadsafe(self, callback):
        """From any thread: calls back in the loop's thread."""
        self.calls.append(callback)
        if self.thread != _thread.get_ident():      # the loop itself looks before it waits
            try:
                os.write(self.wake_out, b"\0")
            except OSError:
                pass        # the pipe is full of wake-ups already, or the loop is closed

    def _woken(self):
        try:
            os.read(self.wake_in, 4096)
        except BlockingIOError:
            pass

    # -- running
    def run(self):
        """Runs until stop(result), and returns the result; a stop() that came first counts."""
        self.thread = _thread.get_ident()
        while self.running:
            self.step()
        return self.result

    def stop(self, result=None):
        self.result, self.running = result, False

    def step(self):
        """Waits for the next thing that happens and makes its calls."""
        for call in self._happened():
            try:
                call()
            except Exception as error:
                if self.on_error is None or isinstance(error, Failure):
                    raise
                self.on_error(error)

    def _happened(self):
        """The calls of one round.  Each is looked up when its turn comes: an earlier one may have taken it back."""
        while self.timers and self.timers[0].callback is None:
            heapq.heappop(self.timers)
        patience = max(0, self.timers[0].when - time.monotonic()) if self.timers else None
        for calls, ready in zip((self.reads, self.writes), self._ready(0 if self.calls else patience)):
            for fd in ready:
                call = calls.get(fd)
                if call:
                    yield call
        now = time.monotonic()
        while self.timers and self.timers[0].when <= now:
            callback = heapq.heappop(self.timers).callback
            if callback:
                yield callback
        for _ in range(len(self.calls)):    # what these add waits until descriptors and timers have had their turn
            yield self.calls.popleft()

    def _ready(self, patience):
        """(descriptors to read, descriptors to write); what is broken is ready for both."""
        if not self.poll:
            return select.select(self.reads, self.writes, (), patience)[:2]
        found = self.poll.poll(None if patience is None else math.ceil(patience * 1000))
        return ([fd for fd, events in found if events & ~select.POLLOUT],
                [fd for fd, events in found if events & ~select.POLLIN])

    def close(self):
        """Gives back signals and descriptors; in a forked child it touches nothing the parent still uses."""
        for number in list(self.signals):
            self.on_signal(number, None)
        if self.old_wakeup is not None:
            signal.set_wakeup_fd(self.old_wakeup)
        wake_out, self.wake_out = self.wake_out, -1     # a helper thread may still call back
        os.close(self.wake_in)
        os.close(wake_out)


# ---------------------------------------------------------------- group sockets

# Numbers that Python's socket module lacks in some or all versions, or on some systems.
if LINUX:
    SIOCGIFFLAGS, SIOCGIFADDR, SIOCGIFBRDADDR, IFREQ_SIZE = 0x8913, 0x8915, 0x8919, 40
else:                                               # macOS and the BSDs: the size of the request is part of its number
    IFREQ_SIZE = 144 if sys.platform.startswith("netbsd") else 32
    SIOCGIFFLAGS, SIOCGIFADDR, SIOCGIFBRDADDR = (0xc0006900 + (IFREQ_SIZE << 16) + number for number in (17, 33, 35))
IFF_UP, IFF_BROADCAST, IFF_LOOPBACK, IFF_POINTOPOINT = 0x1, 0x2, 0x8, 0x10
IP_PKTINFO = 8 if LINUX else 26
IP_RECVIF, IP_RECVDSTADDR = 30 if sys.platform.startswith("openbsd") else 20, 7     # the BSDs
IP_ONESBCAST = 23                                   # FreeBSD
IP_BOUND_IF, IPV6_BOUND_IF = 25, 125                # macOS
IP_MULTICAST_ALL, IPV6_MULTICAST_ALL = 49, 29       # Linux
IPV6_RECVPKTINFO, IPV6_PKTINFO = getattr(socket, "IPV6_RECVPKTINFO", 61), getattr(socket, "IPV6_PKTINFO", 46)   # macOS
SO_RXQ_OVFL, SO_REUSEPORT = 40, getattr(socket, "SO_REUSEPORT", None)       # Linux; not on Linux
TENTATIVE, DUPLICATE = 0x40, 0x08                   # flags of an IPv6 address that cannot be used
TRUNCATED = int(socket.MSG_TRUNC)                   # the enumeration's own arithmetic is slow
PRIVATE_LINKS = ("awdl", "llw", "anpi")             # macOS's own: AirDrop and the like

PKTINFO = struct.Struct("@i4s4s")       # interface, this machine's address, where it was sent to
PKTINFO6 = struct.Struct("@16sI")       # address (the source to send from, the destination of what came), interface
HOPS = 31                   # multicast: across a campus, not across the world
RECEIVE_BUFFER = 1 << 20    # bytes the kernel may keep for us, if its own limit lets it: a burst of 1,000 datagrams
RECEIVE_ROUND = 256         # datagrams taken in a row
REJECTS_MAX = 64            # unwanted datagrams passed over in one call: a flood of them must not hold the loop
REFRESH_EVERY = 10.0        # seconds between two looks at the interfaces
REFRESH_PAUSE = 1.0         # seconds between two looks at the interfaces that failed sends ask for
ANY_PORT_TRIES = 100        # numbers that the system gives for TCP, of which one is free for UDP as well
BACKLOG = 512               # connections the kernel keeps while we are busy: a cold cluster's first answers


class Interface(collections.namedtuple("Interface", "name index flags addresses broadcast")):
    """One network interface.  addresses are those of the family asked for, None where the system does not tell, as
    those of IPv6 outside Linux."""
    __slots__ = ()

    @property
    def loopback(self):
        return bool(self.flags & IFF_LOOPBACK) or self.name in LOOPBACK_NAMES

    @property
    def usable(self):
        """Whether to send here unasked.  Outside Linux nearly every system keeps IPv6 tunnels and links of its own."""
        own = self.addresses is None and (self.flags & IFF_POINTOPOINT or self.name.startswith(PRIVATE_LINKS))
        return bool(self.flags & IFF_UP) and self.addresses != [] and not own


def local_interfaces(family):
    """Every Interface of this machine, up or not.  Of IPv4 addresses only the first is known: broadcasts carry it."""
    names, found = interface_names(), []
    inet6 = inet6_addresses() if LINUX and family == socket.AF_INET6 else {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for index, name in names:
            flags = interface_field(probe, SIOCGIFFLAGS, name)
            address = interface_field(probe, SIOCGIFADDR, name) if family == socket.AF_INET else None
            addresses = [socket.inet_ntoa(address[4:8])] if address else []
            if family == socket.AF_INET6:
                addresses = inet6.get(index, []) if LINUX else None
            broadcast = address and interface_field(probe, SIOCGIFBRDADDR, name)
            found.append(Interface(name, index, struct.unpack_from("@H", flags or bytes(2))[0], addresses,
                                   socket.inet_ntoa(broadcast[4:8]) if broadcast else ""))
    return found


def interface_names():
    """[(number, name), ...] of all interfaces."""
    if hasattr(socket, "if_nameindex"):
        return socket.if_nameindex()
    return [(int(read_lines("/sys/class/net/%s/ifindex" % name)[0]), name)      # PyPy
            for name in sorted(os.listdir("/sys/class/net"))]


def interface_field(probe, request, name):
    """What the kernel answers about one interface, after its name; None where it has no such thing, or is gone."""
    try:
        return fcntl.ioctl(probe.fileno(), request, os.fsencode(name).ljust(IFREQ_SIZE, b"\0"))[16:]
    except OSError:
        return None


def inet6_addresses():
    """{interface index: [IPv6 addresses]} of the addresses that can be used now."""
    found = {}
    for address, index, _, _, flags, _ in map(str.split, read_lines("/proc/net/if_inet6")):
        if not int(flags, 16) & (TENTATIVE | DUPLICATE):
            found.setdefault(int(index, 16), []).append(socket.inet_ntop(socket.AF_INET6, bytes.fromhex(address)))
    return found


def device_index(name):
    """The number of the interface with this name.  Failure names those there are."""
    known = {known: index for index, known in interface_names()}
    if name not in known:
        raise Failure(name, "no such device, this machine has: " + " ".join(known), GROUP_FORMS, EXIT_USAGE)
    return known[name]


def socket_address(family, address, port, device=""):
    """What bind, connect and sendto want; an IPv6 address of one link carries that link's number."""
    if family == socket.AF_INET:
        return address, port
    return address, port, 0, device_index(device) if device else 0


class PortTaken(Failure):
    """A port to listen on is in use; it may become free."""


class GroupSocket:
    """A UDP socket for one group.

    As a listener it hears the group beside every other listener on this host, and what is sent to this host alone;
    of several listeners only one hears that.  Where the group is a broadcast address it hears any broadcast, and
    nothing else but that: so groups divide a network.  A group on the loopback network hears nothing from elsewhere.
    Sending to a broadcast or multicast group goes out of every interface that is up, each time from an address of
    that interface, so that whoever hears it can connect back; out of loopback only where there is nothing else.
    On the BSDs that is each network's own broadcast address, since 255.255.255.255 is sent by one interface only, or
    to the default router.  Where no interface is up yet, the socket waits for one: see refresh().

    source   local address to send from, as parse_address gives it, for a host that stands in several networks
    port     the number to send from, 0 for any
    by       another one of the same family, by whose socket and number this one sends
    home     the interface that was named, or that has the source address; None if there is none
    tried    names of the interfaces that the last send used, "" for the system's own choice
    forbidden  whether something on this machine, as a firewall, refused to send the last one
    dropped  datagrams that the kernel threw away, since nobody fetched them
    """

    def __init__(self, group, listen, source=None, port=0, by=None):
        self.group, self.listen, self.source, self.port = group, listen, source, port
        self.tried, self.dropped, self.joined, self.targets, self.home = [], 0, {}, [], None
        self.index, self.loopback_indexes, self.refreshed = 0, set(), 0.0
        self.broadcasts, self.hears_broadcasts, self.forbidden = set(), False, False
        self.packed = socket.inet_pton(group.family, group.address)
        try:
            self.socket = by.socket if by else socket.socket(group.family, socket.SOCK_DGRAM)
        except OSError as error:
            raise Failure("cannot use the group %s" % (group,), reason_of(error),
                          "this machine has no IPv6" if group.family == socket.AF_INET6 else "") from None
        try:
            if not by:
                self._options()
                self._bind()
            self._read_interfaces()
            if group.kind == "multicast" and listen:
                problems = self._join()
                if problems and not self.joined:
                    raise Failure("cannot join %s" % (group,), ", ".join(problems))
        except BaseException:
            self.close()
            raise

    # -- making
    def _options(self):
        own, ip, ip6 = socket.SOL_SOCKET, socket.IPPROTO_IP, socket.IPPROTO_IPV6
        listen, six, bsd = self.listen, self.group.family == socket.AF_INET6, not (LINUX or MACOS)
        self.socket.setblocking(False)
        for wanted, *option in (
                (True, own, socket.SO_BROADCAST, 1),
                (six, ip6, socket.IPV6_V6ONLY, 1),              # a listener for IPv4 may share the port
                (six, ip6, socket.IPV6_MULTICAST_HOPS, HOPS),
                (six, ip6, socket.IPV6_MULTICAST_LOOP, 1),
                (six, ip6, IPV6_RECVPKTINFO, 1),
                (not six, ip, socket.IP_MULTICAST_TTL, bytes([HOPS])),      # OpenBSD takes one byte only
                (not six, ip, socket.IP_MULTICAST_LOOP, bytes([1])),
                (not six and LINUX, ip, IP_MULTICAST_ALL, 0),   # else it hears what others on this host have joined
                (not six and not bsd, ip, IP_PKTINFO, 1),
                (listen, own, socket.SO_REUSEADDR, 1),
                (listen and LINUX, own, SO_RXQ_OVFL, 1),
                # The BSDs share a port among listeners only so; on Linux it would share out what must reach all.
                (listen and not LINUX and SO_REUSEPORT, own, SO_REUSEPORT, 1)):
            if wanted:
                self.socket.setsockopt(*option)
        if six and LINUX:
            self._try(ip6, IPV6_MULTICAST_ALL, 0)       # not before Linux 4.20
        if not six and bsd:
            self._try(ip, IP_RECVDSTADDR, 1)
            if not self._try(ip, IP_RECVIF, 1) and self.group.only and listen:
                raise Failure(str(self.group), "this system does not tell which device a datagram came in by")
            if sys.platform.startswith("freebsd"):
                self._try(ip, IP_ONESBCAST, 1)          # a network's own broadcast then goes out as 255.255.255.255
        size = RECEIVE_BUFFER
        while listen and not self._try(own, socket.SO_RCVBUF, size) and size > DATAGRAM_MAX:
            size //= 2          # NetBSD refuses what is above its limit, where others take the limit

    def _try(self, *option):
        """Whether the system takes this option."""
        try:
            self.socket.setsockopt(*option)
        except OSError:
            return False
        return True

    def _bind(self):
        group, (address, _, scope) = self.group, self.source or ("", 0, "")
        if self.listen:
            here = group.address if group.loopback and group.kind == "unicast" else ""
            local, what = socket_address(group.family, here, group.port), "cannot listen on UDP port %d" % group.port
        elif address or self.port:
            local = socket_address(group.family, address or own_address(group), self.port, scope)
            what = "cannot send from %s" % (address or "UDP port %d" % self.port)
        else:
            return
        try:
            self.socket.bind(local)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                hint = "another program keeps it; GROUP may name another port, the same on all machines: ADDRESS:PORT"
                raise PortTaken(what, reason_of(error), hint if self.listen else "") from None
            hint = "it must be an address of this machine: ip address" if error.errno == errno.EADDRNOTAVAIL else ""
            raise Failure(what, reason_of(error), hint) from None

    # -- interfaces
    def refresh(self):
        """Looks at the interfaces again: new ones are used and joined.  To be called every few seconds."""
        try:
            self._read_interfaces()
        except (Failure, OSError):
            return          # the device is gone for now
        if self.group.kind == "multicast" and self.listen:
            self._join()

    def _read_interfaces(self):
        self.refreshed = time.monotonic()
        group = self.group
        self.index = device_index(group.only) if group.only else 0
        if group.kind == "unicast" and not (group.only or self.source or self.listen):
            self.targets = [None]
            return
        found = local_interfaces(group.family)
        self.loopback_indexes = {interface.index for interface in found if interface.loopback}
        self.broadcasts = {ALL_HOSTS}.union(interface.broadcast for interface in found)
        self.hears_broadcasts = group.address in self.broadcasts or is_broadcast(group)
        self.targets = self._choose(found) if group.kind != "unicast" or group.only or self.source else [None]

    def _choose(self, found):
        """The interfaces to use: the one that was named; that of the source; else all, loopback last.  None in the
        list stands for the system's own choice."""
        group = self.group
        if group.only or self.source:
            self.home = next((interface for interface in found if (
                interface.index == self.index if group.only else self.source[0] in (interface.addresses or ()))), None)
            return [self.home] if group.only or group.kind != "unicast" else [None]
        usable = [interface for interface in found if interface.usable]
        outer = [] if group.loopback else [interface for interface in usable if not interface.loopback]
        if group.kind == "broadcast" and not LINUX:
            outer = [interface for interface in outer if interface.flags & IFF_BROADCAST]
        return outer or [interface for interface in usable if interface.loopback]

    def _join(self):
        """Joins the group on every interface in use that it is not yet joined on.  Returns the problems."""
        wanted, problems = {interface.index: interface for interface in self.targets if interface}, []
        for index in set(self.joined) - set(wanted):
            self._membership(self.joined.pop(index), join=False)
        for index in set(wanted) - set(self.joined):
            problem = self._membership(wanted[index], join=True)
            if problem:
                problems.append("%s: %s" % (wanted[index].name, problem))
            else:
                self.joined[index] = wanted[index]
        return problems

    def _membership(self, interface, join):
        """Joins or leaves on one interface.  Returns the problem, None if there is none."""
        if self.group.family == socket.AF_INET6:
            return self._set_one(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP if join else socket.IPV6_LEAVE_GROUP,
                                 [struct.pack("@16sI", self.packed, interface.index)])
        return self._set_one(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP if join else socket.IP_DROP_MEMBERSHIP,
                             [self.packed + request for request in interface_requests(interface, join=True)])

    def _set_one(self, level, option, requests):
        """Sets the option to the first of these values that the system understands.  Returns the problem or None."""
        for request in requests:
            try:
                return self.socket.setsockopt(level, option, request)
            except OSError as error:
                problem = None if error.errno == errno.EADDRINUSE else reason_of(error)
                if error.errno != errno.EINVAL:
                    break
        return problem

    # -- sending
    def send(self, data):
        """Sends one datagram to the group out of every interface in use.  Returns the problems, one text for each
        interface that failed; it reached nobody when there are as many as were tried."""
        self.tried, problems = [interface.name if interface else "" for interface in self.targets], []
        self.forbidden = False
        for interface in self.targets:
            try:
                self._send(data, interface)
            except OSError as error:
                self.forbidden = self.forbidden or isinstance(error, PermissionError)
                problems.append("%s%s" % (interface.name + ": " if interface else "", reason_of(error)))
        if not self.targets:
            problems.append("no interface is up")
        if problems and time.monotonic() - self.refreshed > REFRESH_PAUSE:
            self.refresh()
        return problems

    def _send(self, data, interface):
        group, index, notes = self.group, interface.index if interface else 0, []
        target = (group.address, group.port, 0, index)[:4 if group.family == socket.AF_INET6 else 2]
        if interface and not LINUX:
            self._steer(interface)
            if group.kind == "broadcast" and not MACOS and interface.broadcast:
                target = (interface.broadcast, group.port)
        elif interface and group.family == socket.AF_INET6:
            notes = [(socket.IPPROTO_IPV6, IPV6_PKTINFO, PKTINFO6.pack(bytes(16), index))]
        elif interface:
            source = bytes(4) if self.source or not interface.addresses else socket.inet_aton(interface.addresses[0])
            notes = [(socket.IPPROTO_IP, IP_PKTINFO, PKTINFO.pack(index, source, bytes(4)))]
        self.socket.sendmsg([data], notes, 0, target)

    def _steer(self, interface):
        """Names the interface for the next datagram where no note beside the datagram can."""
        six, multicast = self.group.family == socket.AF_INET6, self.group.kind == "multicast"
        level = socket.IPPROTO_IPV6 if six else socket.IPPROTO_IP
        if multicast and six:
            self.socket.setsockopt(level, socket.IPV6_MULTICAST_IF, interface.index)
        elif multicast:
            self._set_one(level, socket.IP_MULTICAST_IF, interface_requests(interface, join=False))
        elif MACOS:
            self.socket.setsockopt(level, IPV6_BOUND_IF if six else IP_BOUND_IF, interface.index)

    def send_to(self, data, address):
        """Sends one datagram to one socket address.  Returns whether it could be sent; on its way it may get lost."""
        try:
            self.socket.sendto(data, address)
        except OSError:
            return False
        return True

    def heard_on(self):
        """Names of the interfaces in use; none where the system chooses."""
        return [interface.name for interface in self.targets if interface]

    # -- hearing
    def receive(self):
        """The next datagram, as (bytes, source address as the kernel gives it, interface number); None when there is
        no more for now.  Passes over what is too long, came in by another device, or is only news of an error."""
        for _ in range(REJECTS_MAX):
            try:
                data, notes, flags, source = self.socket.recvmsg(DATAGRAM_MAX, 128)
            except BlockingIOError:
                return None
            except OSError:
                continue        # what the network said about something sent earlier
            index, destination, own = self._note(notes)
            # This host's own datagrams to one of its own addresses pass through loopback, whatever the device.
            here = not self.group.only or index == self.index or index in self.loopback_indexes
            if here and not flags & TRUNCATED and self._concerned(destination, own):
                return data, source, index
        return None

    def datagrams(self):
        """Those that have come, as receive() has them, up to a number: signals and timers must get their turn."""
        for _ in range(RECEIVE_ROUND):
            received = self.receive()
            if received is None:
                return
            yield received

    def _note(self, notes):
        """What came beside a datagram: (interface number, packed address it was sent to or None where the system does
        not tell, whether that is known to be one of this machine's).  Keeps the count of the dropped."""
        index, destination, own = 0, None, False
        for level, kind, value in notes:
            if (level, kind) == (socket.IPPROTO_IP, IP_PKTINFO):
                index, local, destination = PKTINFO.unpack_from(value)
                own = local == destination      # for a broadcast or multicast it is the address to answer from
            elif (level, kind) == (socket.IPPROTO_IP, IP_RECVIF) and not LINUX:
                index = struct.unpack_from("@2xH", value)[0]        # sockaddr_dl: length, family, index
            elif (level, kind) == (socket.IPPROTO_IP, IP_RECVDSTADDR) and not LINUX:
                destination = value[:4]
            elif (level, kind) == (socket.IPPROTO_IPV6, IPV6_PKTINFO):
                destination, index = PKTINFO6.unpack_from(value)
            elif (level, kind) == (socket.SOL_SOCKET, SO_RXQ_OVFL):
                self.dropped = struct.unpack("@I", value)[0]
        return index, destination, own

    def _concerned(self, destination, own):
        """Whether what was sent to this address is for this listener: the group itself, an address of this machine,
        and, for a group that is a broadcast, any broadcast."""
        if not self.listen or destination in (None, self.packed) or own:
            return True
        family = self.group.family
        address = socket.inet_ntop(family, destination)
        if kind_of(address, family) == "multicast":
            return False
        # Linux says what is its own; elsewhere what is no broadcast that is known must be.
        broadcast = address in self.broadcasts or LINUX and family == socket.AF_INET
        return not broadcast or self.hears_broadcasts

    def advice(self):
        """What to do where the group reaches nobody but this machine itself, and "" where it does."""
        if self.group.loopback or any(not (interface and interface.loopback) for interface in self.targets):
            return ""
        outer = [interface.name for interface in local_interfaces(socket.AF_INET6)
                 if interface.usable and not interface.loopback]
        if self.group.family == socket.AF_INET and outer:
            return "only loopback has an IPv4 address here; to use IPv6, set on all machines: GROUP=ff02::1%" + outer[0]
        return "no network interface but loopback is up"

    def fileno(self):
        return self.socket.fileno()

    def close(self):
        self.socket.close()


def is_broadcast(group):
    """Whether the kernel knows this address as a broadcast (Linux): as one of a second network of an interface, too."""
    if not LINUX or group.kind != "unicast" or group.family != socket.AF_INET:
        return False
    with socket.socket(group.family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((group.address, group.port))
        except PermissionError:     # SO_BROADCAST is not set
            return True
        except OSError:
            pass
    return False


def interface_requests(interface, join):
    """How an interface is named to IP_ADD_MEMBERSHIP (behind the group) or IP_MULTICAST_IF: the ways to try in turn.

    Linux, FreeBSD and newer BSDs take an ip_mreqn, which has the interface's number; the older BSDs EINVAL but for
    its address; macOS takes an ip_mreqn for sending only, and to join wants 0.0.0.NUMBER in place of the address.
    """
    number = struct.pack("@4si", bytes(4), interface.index)
    address = socket.inet_aton(interface.addresses[0]) if interface.addresses else None
    if MACOS and join:
        return [struct.pack(">I", interface.index)]
    return [number if join else bytes(4) + number] + ([address] if address and not LINUX else [])


# ---------------------------------------------------------------- TCP listeners

def own_address(group):
    """Where those who answer on this group may reach this machine: by loopback alone if the group is there."""
    return ("::1" if group.family == socket.AF_INET6 else "127.0.0.1") if group.loopback else ""


def open_ports(group, ports=None):
    """(GroupSocket, listening TCP socket): what a submitter sends from and hears, datagrams and connections, by one
    number, so that one rule of a firewall lets in both.

    ports: [(low, high), ...] of which the first number that is free for both is taken; None for any.  Neither socket
    shares it with anybody, so a connection that has come by it keeps the number in use as long as it lives: who
    searches again uses the sockets again.  It is never the group's own port.  PortTaken where all are in use.
    """
    return open_first(ports, group.port, lambda number: _open_number(group, number))


def open_first(ports, without, open_at):
    """What open_at(number) gives for the first number of these ports that is free, but for one number."""
    numbers = [number for low, high in ports or () for number in range(low, high + 1) if number != without]
    if ports and not numbers:
        raise Failure("--listen-ports " + ports_text(ports), "that is the group's own port", "name others", EXIT_USAGE)
    for number in numbers or [0] * ANY_PORT_TRIES:
        try:
            return open_at(number)
        except PortTaken:
            pass
    raise PortTaken("no port to hear answers on", "all of %s are in use, for TCP or for UDP" % (
        "--listen-ports " + ports_text(ports) if ports else "this machine's"), "--listen-ports may name more")


def _open_number(group, number):
    listener = listen_at(socket_address(group.family, own_address(group), number), group.family)
    try:
        number = listener.getsockname()[1]
        if number == group.port:
            raise PortTaken("UDP port %d" % number, "it is the group's own")
        return GroupSocket(group, listen=False, port=number), listener
    except BaseException:
        listener.close()
        raise


def listen_at(address, family, backlog=BACKLOG, share=False):
    """A non-blocking listening TCP socket at this socket address; PortTaken where its port is in use.

    share: whether connections that came by the port earlier, and live, may keep it.
    """
    made = None
    try:
        made = socket.socket(family, socket.SOCK_STREAM)
        made.setblocking(False)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if share:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        elif LINUX:     # a connection that we close is not to keep the port for another minute
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_LINGER2, -1)
        made.bind(address)
        made.listen(backlog)
        return made
    except OSError as error:
        if made:
            made.close()
        raise (PortTaken if error.errno == errno.EADDRINUSE else Failure)(
            "cannot listen" + (" on TCP port %d" % address[1] if address[1] else ""), reason_of(error)) from None


class Acceptor:
    """Takes the connections that come to a listening socket: on_connection(socket, address) for each.

    Out of descriptors, or when may_accept() says no, they wait in the kernel and are asked for again a moment later.
    on_shortage(), if given, hears of the former.  Whoever makes it closes it, the listening socket with it.
    """
    PAUSE = 0.1             # seconds
    ROUND = 64              # connections taken in a row

    def __init__(self, loop, listener, on_connection, may_accept=None, on_shortage=None):
        self.loop, self.listener, self.on_connection = loop, listener, on_connection
        self.may_accept, self.on_shortage = may_accept, on_shortage
        self.timer = NO_TIMER
        self.port = listener.getsockname()[1]
        self._resume()

    def _resume(self):
        self.loop.watch(self.listener.fileno(), read=self._accept)

    def _pause(self):
        self.loop.watch(self.listener.fileno())
        self.timer = self.loop.call_later(self.PAUSE, self._resume)

    def _accept(self):
        for _ in range(self.ROUND):
            if self.may_accept and not self.may_accept():
                return self._pause()
            try:
                connection, address = self.listener.accept()
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self._pause()
                    return self.on_shortage and self.on_shortage()
                return          # nobody is there any more, or who was has gone; or close() came in a call
            connection.setblocking(False)
            self.on_connection(connection, address)

    def close(self):
        """May be called again."""
        self.timer.cancel()
        self.loop.watch(self.listener.fileno())
        self.listener.close()


class Connector:
    """A TCP connection on its way to an address: calls on_connected(socket), who owns it from then on, or
    on_failed(errno), once, and from the loop.  close() gives it up; it may be called again, also after that."""

    def __init__(self, loop, address, seconds, on_connected, on_failed):
        self.loop, self.on_connected, self.on_failed, self.socket = loop, on_connected, on_failed, None
        try:
            self.socket = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET, socket.SOCK_STREAM)
            self.socket.setblocking(False)
            tune(self.socket)
            problem = self.socket.connect_ex(address)
        except OSError as error:
            problem = error.errno
        if problem in (0, errno.EINPROGRESS):
            loop.watch(self.socket.fileno(), write=self._connected)
            problem = errno.ETIMEDOUT
        else:
            seconds = 0
        self.timer = loop.call_later(seconds, lambda: self._fail(problem))

    def _connected(self):
        problem = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if problem:
            return self._fail(problem)
        made = self._release()
        self.on_connected(made)

    def _fail(self, problem):
        self.close()
        self.on_failed(problem)

    def _release(self):
        self.timer.cancel()
        made, self.socket = self.socket, None
        if made:
            self.loop.watch(made.fileno())
        return made

    def close(self):
        made = self._release()
        if made:
            made.close()


def address_towards(address):
    """This machine's address as whoever is at that socket address sees it; "" where there is no way."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            probe.connect(address)
            return probe.getsockname()[0].partition("%")[0]
    except OSError:
        return ""           # also without a descriptor for it


def settings_here(settings):
    """These settings, with what only this machine can say: the addresses of the names in --accept-server and
    --reject-servers, the number of CPUs, cservice's user.  A rejected name stays as well: workers say what they are
    called."""
    known, accept, reject = {}, getattr(settings, "accept_server", ()), getattr(settings, "reject_servers", ())
    if not all(map(parse_address, accept + reject)):
        known["accept_server"] = tuple(address for host in accept for address in addresses_of(host, True))
        known["reject_servers"] = reject + tuple(address for host in reject for address in addresses_of(host, False))
    if hasattr(settings, "concurrency"):        # cservice's
        known["concurrency"] = settings.concurrency or usable_cpus()
        known["user"] = settings.user and user_named(settings)
    return Settings(dict(vars(settings), **known)) if known else settings


def user_named(settings):
    """cservice's user as pwd has it."""
    import pwd
    try:
        return pwd.getpwnam(settings.user)
    except (KeyError, ValueError):
        raise Failure(settings.given["user"], "not accepted", "accepted: the name of a user of this machine",
                      EXIT_USAGE) from None


def addresses_of(host, needed):
    """The addresses of a host by its name, of a numeric address itself."""
    if parse_address(host):
        return [host]
    try:
        return sorted({address[0] for *_, address in socket.getaddrinfo(host, None, 0, socket.SOCK_STREAM)})
    except (OSError, UnicodeError) as error:
        if not needed:
            return []
        raise Failure("--accept-server " + host, "this machine knows no address of it: %s" % reason_of(error),
                      "cwho shows the workers' addresses in its column WORKER", EXIT_USAGE) from None


def is_own_address(address):
    """Whether this numeric address is one of this machine's, or none at all."""
    address, family, _ = parse_address(address) or ("", socket.AF_INET, "")
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError as error:
            return error.errno != errno.EADDRNOTAVAIL
    return True


def receive_up_to(connection, data, size):
    """`data` and what has come behind it, together at most `size` bytes.  EOFError at the other side's end."""
    try:
        part = connection.recv(size - len(data))
    except BlockingIOError:
        return data
    if not part:
        raise EOFError("closed before it said who it was")
    return data + part


def ports_text(ports):
    """The ranges as the user would write them."""
    return ",".join(str(low) if low == high else "%d-%d" % (low, high) for low, high in ports)


# ---------------------------------------------------------------- this machine

def raise_descriptor_limit(wanted):
    """How many descriptors this process may have, at most `wanted`, after its limit was raised as far as it may be."""
    import resource
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (math.inf if limit == resource.RLIM_INFINITY else limit for limit in limits)
    if soft < wanted:
        soft = min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, limits[1]))
    return min(soft, wanted)


@functools.lru_cache(None)
def user_here():
    """USER@HOST of this process, for people to read.  Asked when a worker has been found: it may cost an import."""
    user = os.environ.get("LOGNAME") or os.environ.get("USER")
    if not user:
        import pwd
        try:
            user = pwd.getpwuid(os.getuid()).pw_name
        except KeyError:
            user = str(os.getuid())
    return "%s@%s" % (user, socket.gethostname())


def usable_cpus(root="/"):
    """How many CPUs this process may use: an affinity mask counts, and a quota of its control groups, rounded up."""
    try:
        count = len(os.sched_getaffinity(0))
    except (AttributeError, OSError):
        count = os.cpu_count() or 1
    return max(1, math.ceil(min([count, *cpu_quotas(root)])))


def cpu_quotas(root):
    """The CPUs that each control group of this process and each above it may use at once (Linux; versions 2 and 1).

    A container sees its own group as the root, whatever its name outside: what is not found below is looked for there.
    """
    for line in read_lines(os.path.join(root, "proc/self/cgroup")):
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mounts, files = ((("cpu", controllers), ("cpu.cfs_quota_us", "cpu.cfs_period_us")) if controllers else
                         (("", "unified"), ("cpu.max",)))
        names = [name for name in path.split("/") if name not in ("", "..")]
        for mount in mounts:
            for depth in range(len(names) + 1):
                place = os.path.join(root, "sys/fs/cgroup", mount, *names[:depth])
                words = " ".join(line for name in files for line in read_lines(os.path.join(place, name))).split()
                if len(words) == 2 and words[0].isdigit() and words[1].isdigit() and int(words[1]):     # no max, no -1
                    yield int(words[0]) / int(words[1])


def read_lines(path):
    """The lines of a small file of the system's; none where it is not."""
    try:
        with open(path, errors="replace") as file:
            return file.read().splitlines()
    except OSError:
        return []


O_ACCMODE = getattr(os, "O_ACCMODE", 3)     # PyPy lacks this and what the next two are for


def duplicate(fd, least):
    """A duplicate of the descriptor, closed on exec, with a number of at least this."""
    made = fcntl.fcntl(fd, getattr(fcntl, "F_DUPFD_CLOEXEC", fcntl.F_DUPFD), least)
    os.set_inheritable(made, False)
    return made


def read_into(fd, view, position=None):
    """How many bytes a read put into the view: of a regular file from a position, whatever its offset is."""
    if hasattr(os, "readv") and hasattr(os, "preadv"):
        return os.readv(fd, [view]) if position is None else os.preadv(fd, [view], position)
    data = os.read(fd, len(view)) if position is None else os.pread(fd, len(view), position)
    view[:len(data)] = data
    return len(data)


def fork_reason(error):
    """Why a process could not be started."""
    limit = error.errno == errno.EAGAIN
    return "no more processes are allowed here (ulimit -u, pids.max)" if limit else reason_of(error)


def measured_speed():
    """This machine's speed by a tiny computation; 1 is a laptop of 2020.

    The best of many short looks, each too short to be interrupted often.  Not rounded: two machines of a kind would
    fall on two sides of a step, and then the slower one's name would weigh more than a job.  Long numbers, since what
    hashes cost says more about a CPU's special instructions, and a policy may refuse them.
    """
    base, modulus, best = (1 << 255) - 19, (1 << 256) - 189, float("inf")
    for _ in range(200):
        start = time.perf_counter()
        pow(base, (1 << 31) - 1, modulus)
        best = min(best, time.perf_counter() - start)
    return max(0.125, min(8.0, 17e-6 / best))


# ---------------------------------------------------------------- streams
#
# Sources are read from, sinks written to.  Inherited descriptors belong to others as well: their O_NONBLOCK is
# never touched, so each kind has its own way not to block the loop.

REGULAR, PIPE, SOCKET, TERMINAL, DEVICE = "regular", "pipe", "socket", "terminal", "device"
RWF_NOWAIT = getattr(os, "RWF_NOWAIT", None) if LINUX else None
O_PATH = getattr(os, "O_PATH", 0)
UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS, errno.ESPIPE)
F_DUPFD_QUERY = 1027        # Linux 6.10: are these two the same open file?
PTY_MASTER = os.makedev(5, 2)       # Linux: /dev/ptmx


def stream_kind(fd):
    """What an open descriptor is, or None for what carries no stream (directories, datagram sockets, event queues)."""
    mode = stat.S_IFMT(os.fstat(fd).st_mode)
    if O_PATH and fcntl.fcntl(fd, fcntl.F_GETFL) & O_PATH == O_PATH:
        return None
    if mode == stat.S_IFCHR:
        return TERMINAL if os.isatty(fd) else DEVICE
    if mode == stat.S_IFSOCK:
        return SOCKET if is_stream_socket(fd) else None
    return {stat.S_IFREG: REGULAR, stat.S_IFBLK: REGULAR, stat.S_IFIFO: PIPE}.get(mode)


def is_stream_socket(fd):
    """Whether bytes flow through this socket: it neither listens nor carries datagrams."""
    try:
        with socket.socket(fileno=os.dup(fd)) as probe:
            return (probe.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE) == socket.SOCK_STREAM
                    and not probe.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    except OSError:
        return False        # a family that Python or the system tells nothing of


def offset_of(fd):
    """Where a file is read and written next; None for one that has no such place, as many of /proc and /sys."""
    try:
        return os.lseek(fd, 0, os.SEEK_CUR)
    except OSError:
        return None


def carries_stream(fd, kind, access):
    """Whether a job can do anything with this descriptor: a name space is a regular file that nobody can read, and the
    master of a terminal belongs to the program that shows it, from which it was inherited by mistake."""
    if access is None or kind is TERMINAL and LINUX and os.fstat(fd).st_rdev == PTY_MASTER:
        return False
    try:
        return kind is not REGULAR or access is not IN or os.read(fd, 0) == b""
    except OSError:
        return False


def access_of(fd):
    """IN, OUT or BOTH, as the descriptor was opened; None for one that is good for ioctl only."""
    mode = fcntl.fcntl(fd, fcntl.F_GETFL) & O_ACCMODE
    return {os.O_RDONLY: IN, os.O_WRONLY: OUT, os.O_RDWR: BOTH}.get(mode)


def open_descriptors(highest):
    """The numbers of the open descriptors from 0 to highest."""
    return [fd for fd in range(highest + 1) if is_open(fd)]


def is_open(fd):
    try:
        fcntl.fcntl(fd, fcntl.F_GETFD)
    except OSError:
        return False
    return True


def carried_descriptors(highest):
    """{number: IN, OUT, BOTH or the lower number it shares} of what this process inherited.

    Two numbers of one pipe, socket or open file stay one in the job, so `2>&1` keeps the order of what is written.
    A terminal is read through its lowest number only; its other numbers are for writing.
    """
    result, terminals, alike = {}, set(), {}
    for fd in open_descriptors(highest):
        kind = stream_kind(fd)
        access = kind and access_of(fd)
        if not kind or not carries_stream(fd, kind, access):
            continue
        status = os.fstat(fd)
        if kind is TERMINAL:
            if access is BOTH:
                access = OUT if fd in (1, 2) or status.st_rdev in terminals else IN
            if access is IN:
                terminals.add(status.st_rdev)
        traits = access, status.st_dev, status.st_ino, status.st_rdev
        if kind is REGULAR:     # opened alike, and at the same place
            traits += offset_of(fd), fcntl.fcntl(fd, fcntl.F_GETFL)
        others = alike.setdefault(traits, [])
        # To write one file at one place by two openings makes no sense, so they are one; to read it does.
        same = [other for other in others if kind is not REGULAR or access is not IN or is_same_opening(fd, other)]
        result[fd] = same[0] if same else access
        if not same:
            others.append(fd)
    return result


def is_same_opening(one, two):
    """Whether two descriptors of one file, at the same place, share that place."""
    try:
        return fcntl.fcntl(one, F_DUPFD_QUERY, two) == 1
    except OSError:     # a kernel that does not answer: the one is moved, and the other looked at
        offset = offset_of(one)
        if offset is None:
            return True
        try:
            return os.lseek(one, offset + 1, os.SEEK_SET) == offset_of(two)
        finally:
            os.lseek(one, offset, os.SEEK_SET)


def park(fd):
    """Closes a descriptor but keeps its number occupied, so that nothing of ours ever gets to stand there."""
    null = os.open(os.devnull, os.O_RDWR)
    if null != fd:
        os.dup2(null, fd)
        os.close(null)


def park_standard():
    """Occupies those of standard input, output and error that are closed."""
    for fd in 0, 1, 2:
        if not is_open(fd):
            park(fd)


def is_memory(fd):
    """Whether a device is /dev/null or one of its kin, which never block (Linux gives them the major number 1)."""
    return LINUX and os.major(os.fstat(fd).st_rdev) == 1


F_SETPIPE_SZ, F_GETPIPE_SZ = 1031, 1032     # Linux; Python has the names from 3.10 on
PIPE_FULL = 1 << 16         # what a pipe holds by default
PIPE_SIZE = 1 << 19         # of one that has proved full: half costs 10 % CPU, twice uses up a user's 64 MiB soon
COPY_MAX = 4096             # bytes of an input that are copied before its job reads it: one page of a pipe everywhere


def resize_pipe(fd, size, least=False):
    """Makes a pipe hold so much, a page or more, or `least` so much, for everybody who has it; its contents and flags
    stay as they are."""
    try:
        if LINUX and not (least and fcntl.fcntl(fd, F_GETPIPE_SZ) >= size):
            fcntl.fcntl(fd, F_SETPIPE_SZ, size)
    except OSError:
        pass        # no pipe, or the user's share of pipe memory is used up: smaller pipes are only slower


def unread_bytes(fd):
    """How many bytes are in a pipe, asked at either end, also when all readers have gone, or in a socket, asked at its
    reading end; None where nobody tells."""
    import termios      # whose FIONREAD differs from one machine to the next
    try:
        told = stream_kind(fd) in (PIPE, SOCKET)
        return struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, bytes(4)))[0] if told else None
    except OSError:
        return None


def sees_reading():
    """Whether this system tells when a job begins to read what is in a pipe or a socket."""
    return LINUX and os.access("/proc/self/fd", os.R_OK)


@functools.lru_cache(maxsize=None)
def pipe_calls():
    """(tee, splice) of Linux, which copy or move what is in one pipe into another without waiting, as functions of
    (fd, fd, size); None where there are none.  Asked for while a worker connects: ctypes takes 4 ms to import."""
    try:
        import ctypes
        library = ctypes.CDLL(None, use_errno=True)
        tee, splice = library.tee, library.splice
    except (ImportError, OSError, AttributeError):
        return None

    def checked(size):
        if size < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return size
    tee.restype = splice.restype = ctypes.c_ssize_t
    nonblock = ctypes.c_uint(2)
    return (lambda source, target, size: checked(tee(source, target, ctypes.c_size_t(size), nonblock)),
            lambda source, target, size: checked(splice(source, None, target, None, ctypes.c_size_t(size), nonblock)))


class PipeTap:
    """Reads a pipe or copies what is in it without ever waiting.  Needs pipe_calls().

    It opens the pipe once more, for itself, and copies by way of a pipe of its own.  Where it may not open it, it reads
    that way too: what was once copied from cannot be read with RWF_NOWAIT any more.
    """

    def __init__(self, fd):
        self.tee, self.splice = pipe_calls()
        self.reading, self.writing = os.pipe()
        try:
            self.fd = os.open("/proc/self/fd/%d" % fd, os.O_RDONLY | os.O_NONBLOCK)
        except OSError:
            self.fd = fd        # no /proc, or a pipe that belongs to another user
        self.reopened = self.fd != fd

    def copy_into(self, view):
        return self._pass(self.tee, view)

    def read_into(self, view):
        return read_into(self.fd, view) if self.reopened else self._pass(self.splice, view)

    def _pass(self, call, view):
        size = call(self.fd, self.writing, len(view))
        return read_into(self.reading, view[:size]) if size else 0

    def close(self):
        for fd in [self.reading, self.writing] + [self.fd] * self.reopened:
            os.close(fd)


def open_tap(fd):
    """A PipeTap, or None where the system has no such calls, or no descriptors are left."""
    if not pipe_calls():
        return None
    try:
        tap = PipeTap(fd)
    except OSError:
        return None
    try:
        tap.copy_into(memoryview(bytearray(1)))
    except BlockingIOError:
        pass
    except OSError:
        tap.close()
        return None
    return tap


class InputCount:
    """How much of an input a job has read: what its sink wrote to the job's pipe less what is left in there.

    Who closes the pipe's writing end calls keep() before, and close() when nobody asks any more."""

    def __init__(self, sink):
        self.sink = sink
        self.fd = sink.fd       # which tells what is left; None when it is gone
        self.own = None         # the same where it is ours to close: a reading end
        self.left = None        # bytes that were left when `fd` went

    def keep(self):
        """The writing end is about to be closed.  If there is something left the reading end, which we have given
        away, is opened once more: earlier it would have hidden from us that the job has closed its own."""
        self.left = unread_bytes(self.fd)
        if self.left:
            try:
                self.own = os.open("/proc/self/fd/%d" % self.fd, os.O_RDONLY | os.O_NONBLOCK)
            except OSError:
                self.left = None        # no /proc, or a pipe that belongs to another user
        self.fd = self.own

    def read(self):
        """In bytes, None when it cannot be known."""
        left = self.left if self.fd is None else unread_bytes(self.fd)
        return None if left is None else max(0, self.sink.written - left)      # a job may write to its own input

    def leader_ended(self):
        """The job's first process has.  A pipe tells by itself when nobody reads it any more."""

    def close(self):
        if self.own is not None:
            os.close(self.own)
            self.fd = self.own = None


class SocketCount(InputCount):
    """How much a job has read of a copy that was sent to its socket: what its sink wrote less what waits at the job's
    own end, of which this keeps a descriptor.  As long as that is open nobody else sees that the job has closed its
    own: so /proc is looked at, soon after each write, and then less and less often.

    emptied() is called, once, when the job has read it all; from then on nothing is counted.
    """
    SOON, SELDOM = 0.001, 0.5       # seconds between two looks

    def __init__(self, loop, own, leader, emptied):
        self.loop, self.leader, self.emptied = loop, leader, emptied
        self.fd = self.own = own
        self.sink = None                # a CopySocketSink
        self.left = None
        self.wait = self.SOON
        self.timer = NO_TIMER
        self.look_soon()

    def look_soon(self):
        self._look_in(self.SOON)

    def _look_in(self, seconds):
        if self.own is not None:
            self.timer.cancel()
            self.wait = seconds
            self.timer = self.loop.call_later(seconds, self._look)

    def leader_ended(self):
        self.leader = None
        self._look()

    def is_emptied(self):
        """Whether the job has read it all: emptied() has been called by now."""
        if self.own is not None and self.sink.written and unread_bytes(self.own) == 0 and not self.sink.queue:
            self.close()
            self.emptied()
        return self.own is None

    def _look(self):
        if self.is_emptied():
            return
        if not is_open_elsewhere(self.own, self.leader):
            self.left = unread_bytes(self.own)
            self.close()
        else:
            self._look_in(min(2 * self.wait, self.SELDOM))

    def keep(self):
        """The end of the input follows what was written."""

    def close(self):
        self.timer.cancel()
        super().close()


def is_open_elsewhere(fd, likely):
    """Whether a process other than this one has this socket open.  likely: the pid to be asked first, or None; that one
    has it also when its descriptors are hidden from us."""
    link, own = os.readlink("/proc/self/fd/%d" % fd), str(os.getpid())
    for pid in [str(likely)] * bool(likely) + process_ids():
        try:
            names = os.listdir("/proc/%s/fd" % pid) if pid != own else ()
        except PermissionError:
            if pid == str(likely):
                return True
            continue
        except OSError:
            continue        # it has ended
        if any(read_link("/proc/%s/fd/%s" % (pid, name)) == link for name in names):
            return True
    return False


def read_link(path):
    """Where a link points; "" when it has gone."""
    try:
        return os.readlink(path)
    except OSError:
        return ""


class Input:
    """What feeds one input of a job, for one attempt after another.  read_into(view) returns bytes read, 0 at the end,
    or None when there is nothing now and ready() will be called once there is."""

    def copies(self):
        """The worker can tell when its job reads: until emptied() or commit() only a copy of the beginning is sent.
        Returns whether it is so."""
        return False

    def emptied(self):
        """The job has read all that was sent of a copy.  Returns whether that was still there to be taken."""
        return True

    def remember(self, most):
        """A worker has the job: from now on so many bytes are remembered for the next one; 0: there is none."""

    def can_rewind(self):
        """Whether rewind() may be called."""
        return True

    def rewind(self):
        """The next attempt reads it from its beginning."""

    def commit(self, consumed):
        """The job has read so many bytes, and reads no more; UNKNOWN stands for all that was sent.  What follows stays
        for others.  Returns whether they were still there to be taken."""
        return True

    def close(self):
        """The channel lets go of it; the next one may take it up."""

    def end(self):
        """Gives back what it holds here."""


class Output:
    """What takes one output of a job.  Of its data whoever made it hears when they have left, to give credit back."""

    def feed(self, view):
        """Takes these bytes.  Returns whether the view was kept: then its buffer must not be used again."""
        raise NotImplementedError

    def finish(self):
        """Nothing comes behind them."""


class Source(Input):
    """A descriptor that is read as it comes, by one job."""
    NOT_THERE = ("another program reads it too, and has taken what this job was given as well",
                 "give each of them a pipe of its own; -n where a job needs no standard input")

    def __init__(self, loop, fd, ready):
        self.loop, self.fd, self.ready = loop, fd, ready
        self.closed = self.enlarged = False
        self.ending = False         # what can be read at once is all

    def read_into(self, view):
        size = self._now(self._read, view)
        if size is not None and size >= PIPE_FULL and not self.enlarged:     # a pipe that was full
            self.enlarged = True
            self._enlarge()
        return size

    def _enlarge(self):
        resize_pipe(self.fd, PIPE_SIZE, least=True)

    def _now(self, read, view):
        try:
            return read(view)
        except (BlockingIOError, InterruptedError):
            if self.ending:
                return 0
            self.loop.watch(self.fd, read=self._readable)
            return None

    def _read(self, view):
        return read_into(self.fd, view)

    # -- what is there can be had without taking it
    def can_copy(self):
        """Whether copy_into(), is_all() and take() may be called."""
        return False

    def copy_into(self, view):
        """As read_into, and what is read stays where it is."""
        return self._now(self._copy, view)

    def _copy(self, view):
        return self._read(view)

    def is_all(self, size):
        """Whether nothing can follow the first `size` bytes."""
        return False

    def take(self, copy):
        """Takes what was copied.  Returns whether it was still there: what another reader has left is not to be taken
        from him."""
        view, done = memoryview(bytearray(len(copy))), 0
        try:
            size = self._copy(view) if copy else 0
            if copy[:size] != view[:size]:
                return False
            while done < len(copy):
                part = self._read(view[done:]) if size else 0
                if not part:
                    return False
                done += part
        except OSError:
            return False
        return view == copy

    def _readable(self):
        self.loop.watch(self.fd)
        if not self.closed:
            self.ready()

    def close(self):
        if not self.closed:
            self.closed = True
            self.loop.watch(self.fd)

    def end(self):
        self.close()


class MemorySource(Source):
    """A device like /dev/zero, which gives as much as one wants."""

    def can_copy(self):
        return self.fd > 2

    def take(self, copy):
        return True


class FileSource(Source):
    """A file that is open for reading only, read at a position of its own: the offset, which other processes share,
    stays at `start` until commit() puts it behind what was used."""

    def __init__(self, loop, fd, ready):
        super().__init__(loop, fd, ready)
        self.start = self.position = offset_of(fd)
        self.most = math.inf            # bytes to be sent before the job reads
        self.enlarged = True

    def _read(self, view):
        room = self.most + self.start - self.position
        if room <= 0:
            return None
        size = read_into(self.fd, view if len(view) <= room else view[:room], self.position)
        self.position += size
        return size

    def copies(self):
        self.most = COPY_MAX if self.fd > 2 else math.inf
        return self.fd > 2

    def emptied(self):
        self.most = math.inf
        self.ready()
        return True

    def rewind(self):
        self.position, self.most = self.start, math.inf

    def commit(self, consumed):
        os.lseek(self.fd, min(self.position, self.start + consumed), os.SEEK_SET)
        return True

    def close(self):
        """It waits for nothing."""


class EditedFileSource(Source):
    """A file that is open for reading and writing: one place for both, which other processes share."""
    NOT_THERE = ("the job has read and written it by turns, so what it wrote or read may be at a wrong place",
                 "open it once for reading and once for writing")

    def __init__(self, loop, fd, ready):
        super().__init__(loop, fd, ready)
        self.start = None

    def can_copy(self):
        return True

    def _copy(self, view):
        self.start = offset_of(self.fd)
        return read_into(self.fd, view, self.start)

    def take(self, copy):
        if offset_of(self.fd) == self.start:
            os.lseek(self.fd, len(copy), os.SEEK_CUR)
            return True
        return not copy or bool(fcntl.fcntl(self.fd, fcntl.F_GETFL) & os.O_APPEND)     # the job has written


class SocketSource(Source):
    """A socket that others may share.  Its sink watches the same descriptor, so both go through one duplicate each."""

    def __init__(self, loop, fd, ready):
        self.socket = socket.socket(fileno=os.dup(fd))
        super().__init__(loop, self.socket.fileno(), ready)
        self.enlarged = True

    def can_copy(self):
        return True

    def _copy(self, view):
        return self._read(view, socket.MSG_PEEK)

    def _read(self, view, flags=0):
        try:
            return self.socket.recv_into(view, 0, socket.MSG_DONTWAIT | flags)
        except ConnectionResetError:
            if self.socket.family in (socket.AF_INET, socket.AF_INET6):
                raise           # the input may have been cut short
            return 0            # a job that ended with input unread resets its socket pair

    def close(self):
        super().close()
        self.socket.close()


class AnswerSource(SocketSource):
    """What a job writes to a socket that gets a copy first.  What it has written after it had read the copy goes out
    behind the word that it has read it: in a file that is open both ways, reading and writing have one place."""

    def __init__(self, loop, fd, ready, count):
        super().__init__(loop, fd, ready)
        self.count = count

    def _read(self, view, flags=0):
        if self.count.own is not None:
            view = view[:unread_bytes(self.fd)] or view[:1]     # not what is written after the look
            if self.count.is_emptied():
                self.loop.call_soon_threadsafe(self.ready)
                return None
        return super()._read(view, flags)


def wait_for(fd, events, seconds=None):
    """Waits, outside any loop, for a descriptor of any number; returns whether the events came in time."""
    poll = select.poll()
    poll.register(fd, events)
    return bool(poll.poll(None if seconds is None else math.ceil(seconds * 1000)))


class Helper:
    """A thread for what may block: does one thing after another, and hands over what came of it in the loop."""

    def __init__(self, loop):
        self.loop, self.tasks = loop, None

    def call(self, work, done):
        """done(work()), work() in the thread and done() in the loop.  Failure where there can be no thread."""
        if self.tasks is None:
            import queue
            import threading
            tasks = queue.SimpleQueue()
            try:
                threading.Thread(target=self._run, args=(tasks,), daemon=True).start()
            except RuntimeError as error:
                raise Failure("no thread for what may block", error, "ulimit -u, -v and pids.max bound them") from None
            self.tasks = tasks
        self.tasks.put((work, done))

    def _run(self, tasks):
        for work, done in iter(tasks.get, None):
            self.loop.call_soon_threadsafe(functools.partial(done, work()))

    def end(self):
        """After what it has to do."""
        if self.tasks is not None:
            self.tasks.put(None)


class SharedSource(Source):
    """A pipe, terminal or device that others may read too: ready one moment and empty the next.

    The system can be asked not to wait for a pipe (RWF_NOWAIT, Linux).  For a FIFO opened by its name, for anything
    else and on other systems a helper thread reads: once, whenever somebody wants it.
    """
    CHUNK = 1 << 16

    def __init__(self, loop, fd, ready):
        super().__init__(loop, fd, ready)
        self.pipe = stream_kind(fd) is PIPE
        self.threaded = not self.pipe or RWF_NOWAIT is None
        self.tap = None             # a PipeTap, once it was copied
        self.helper, self.asked = Helper(loop), False       # whether it reads, or will
        self.result = None          # bytes or an OSError

    def read_into(self, view):
        if not self.threaded:
            try:
                return super().read_into(view)
            except OSError as error:
                if error.errno not in UNSUPPORTED:
                    raise
                self.threaded = True
        if self.result is None:
            self._ask()
            return None
        if isinstance(self.result, OSError):
            raise self.result
        size = min(len(view), len(self.result))
        view[:size] = self.result[:size]
        if size:
            self.result = self.result[size:] or None
        return size

    def _read(self, view):
        return self.tap.read_into(view) if self.tap else os.preadv(self.fd, [view], -1, RWF_NOWAIT)

    # -- copies of a pipe
    def can_copy(self):
        if self.pipe and not self.tap:
            self.tap = open_tap(self.fd)
            self.threaded = self.threaded and not self.tap
        return bool(self.tap)

    def _copy(self, view):
        return self.tap.copy_into(view)

    def is_all(self, size):
        """All writers have gone."""
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        return any(events & select.POLLHUP for _, events in poll.poll(0)) and unread_bytes(self.fd) == size

    def _ask(self):
        if not self.asked and not self.closed:
            self.asked = True
            self._fetch_soon()

    def _fetch_soon(self):
        self.helper.call(self._fetch, self._arrived)

    def _fetch(self):
        """Bytes, an OSError, or None for nothing after all."""
        while not self.closed:
            try:
                return os.read(self.fd, self.CHUNK)
            except BlockingIOError:     # somebody else set O_NONBLOCK on it
                wait_for(self.fd, select.POLLIN)
            except OSError as error:
                return error
        return None

    def _arrived(self, result=None):
        self.asked, self.result = False, result
        if not self.closed:
            self.ready()

    def _enlarge(self):
        super()._enlarge()
        if self.tap:
            resize_pipe(self.tap.writing, PIPE_SIZE, least=True)

    def close(self):
        if self.tap and not self.closed:
            self.tap.close()
        super().close()
        self.helper.end()


class TerminalSource(SharedSource):
    """The user's terminal, read while this process is in its foreground.  stops: whether the process stops like others
    when it would read from the background; else it leaves the terminal alone and looks again."""
    LOOK = 1.0              # seconds
    STOPPED_LOOK = 0.25     # after the stop, which may not have been possible

    def __init__(self, loop, fd, ready, stops=False):
        super().__init__(loop, fd, ready)
        self.stops = stops

    def _fetch_soon(self):
        if not in_background(self.fd):
            return super()._fetch_soon()
        if self.stops:
            stop_reading_group()        # the system would do it to a thread that reads on and on
        self.loop.call_later(self.STOPPED_LOOK if self.stops else self.LOOK, self._arrived)

    def _fetch(self):
        """None also when the terminal has become somebody else's while this waited."""
        if not MACOS:       # whose poll knows no terminals
            wait_for(self.fd, select.POLLIN)
        result = super()._fetch() if not in_background(self.fd) else None
        return None if isinstance(result, OSError) and result.errno == errno.EIO and in_background(self.fd) else result


def open_source(loop, fd, ready):
    kind, offset = stream_kind(fd), offset_of(fd)
    if kind is REGULAR and access_of(fd) is IN and offset is not None:
        return FileSource(loop, fd, ready)
    if kind is REGULAR and offset is not None:
        return EditedFileSource(loop, fd, ready)
    if kind is DEVICE and is_memory(fd):
        return MemorySource(loop, fd, ready)
    return {SOCKET: SocketSource, TERMINAL: TerminalSource}.get(kind, SharedSource)(loop, fd, ready)


class ReplayableInput(Input):
    """One that can start again by remembering what was read, up to a cap, in memory.

    Until a worker has accepted the job all is remembered, which the first window bounds: a refusal loses nothing.
    While it is COPIED what is remembered is still there to be read by others as well; once it is EAGER it is not.
    """
    UNREAD, COPIED, EAGER = "unread", "copied", "eager"

    def __init__(self, live):
        self.live = live
        self.cap = WINDOW_START
        self.recording = True
        self.ended = False
        self.state = self.UNREAD
        self.kept = bytearray()
        self.position = 0

    def read_into(self, view):
        if self.position < len(self.kept):
            return self._replay(view)
        if self.ended or self.state is self.COPIED:
            return 0 if self.ended else self._copy(view)
        self.state = self.EAGER
        size = self.live.read_into(view)
        self.ended = size == 0
        if size and self.recording:
            if len(self.kept) + size > self.cap:
                self.remember(0)
            else:
                self.kept += view[:size]
                self.position += size
        return size

    def _replay(self, view):
        size = min(len(view), len(self.kept) - self.position)
        view[:size] = self.kept[self.position:self.position + size]
        self.position += size
        if not self.recording:
            self._forget()
        return size

    def _copy(self, view):
        """What is there, once, and the end where it follows."""
        if self.kept:
            return None
        size = self.live.copy_into(view[:COPY_MAX])
        if size:
            self.kept += view[:size]
            self.position = size
        self.ended = size == 0 or bool(size) and self.live.is_all(size)
        return size

    def copies(self):
        if self.state is self.UNREAD and self.live.can_copy():
            self.state = self.COPIED
        return self.state is self.COPIED

    def emptied(self):
        whole = self.commit(UNKNOWN)
        self.live.ready()
        return whole

    def commit(self, consumed):
        if self.state is not self.COPIED:
            return True
        self.state = self.EAGER
        whole = self.live.take(self.kept[:consumed])
        if not self.recording:
            self._forget()
        return whole

    def remember(self, most):
        self.cap = most
        if not most or len(self.kept) > most:
            self.recording = False
            self._forget()

    def can_rewind(self):
        return self.recording or self.state is self.COPIED

    def rewind(self):
        self.position = 0
        if self.state is self.COPIED:
            self.state, self.ended = self.UNREAD, False
            self.kept.clear()

    def _forget(self):
        if self.position >= len(self.kept) and self.state is not self.COPIED:
            self.kept = bytearray()
            self.position = 0

    def end(self):
        self.live.close()


class Sink(Output):
    """A descriptor that is written to.  consumed(n) is called when bytes have left this process, failed(error) once
    when nobody takes any more, finished() when all has been written after finish()."""
    KEEP = BUFFER // 2      # a view at least this long is kept, a shorter one copied: it would pin a whole buffer
    join = 1 << 16          # short pieces become one, up to here: each by itself would cost 60 bytes more

    def __init__(self, loop, fd, consumed, failed, finished):
        self.loop, self.fd = loop, fd
        self.consumed, self.failed, self.finished = consumed, failed, finished
        self.queue = collections.deque()        # bytearrays and kept views; nobody changes the first one
        self.ending = self.done = self.enlarged = False
        self.written = 0                        # bytes that the system has taken
        # A pipe's writing end becomes readable, on Linux, when its last reader has gone.
        self.reader_loss_visible = LINUX and stream_kind(fd) is PIPE and access_of(fd) is OUT

    def feed(self, view):
        if self.done:
            self.consumed(len(view))
            return False
        sent = 0
        if not self.queue:
            sent = self._try(view)
            if sent < len(view) and not self.enlarged and not self.done:    # a pipe that is full
                self.enlarged = True
                resize_pipe(self.fd, PIPE_SIZE, least=True)
                sent += self._try(view[sent:])
        if sent:
            self.consumed(sent)
        if sent == len(view) or self.done:
            return False
        rest = view[sent:]
        kept = len(rest) >= self.KEEP
        if not kept and len(self.queue) > 1 and len(self.queue[-1]) + len(rest) <= self.join:
            self.queue[-1] += rest
        else:
            self.queue.append(rest if kept else bytearray(rest))
            if len(self.queue) == 1:
                self._wait()
        return kept

    def _wait(self):
        """There is something in the queue, which was empty."""
        self.loop.watch(self.fd, write=self._writable)

    def _try(self, view):
        try:
            sent = self._write(view)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            self._fail(error)
            return 0
        self.written += sent
        return sent

    def _write(self, view):
        return os.write(self.fd, view)

    def _writable(self):
        while self.queue and not self.done:
            view = self.queue[0]
            sent = self._try(view)
            if not sent:
                return
            if sent < len(view):
                self.queue[0] = memoryview(view)[sent:]
            else:
                self.queue.popleft()
            self.consumed(sent)
        self._rest()

    def _rest(self):
        """Nothing is queued: ends it if that is due."""
        if self.ending and not self.done:
            self.close()
            self.finished()
        elif not self.done:
            self.watch_other_side()

    def watch_other_side(self):
        self.loop.watch(self.fd, read=self._reader_gone if self.reader_loss_visible else None)

    def _reader_gone(self):
        if not self.queue:
            self._fail(BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)))

    def _fail(self, error):
        queued = sum(map(len, self.queue))
        self.queue.clear()
        self.close()
        self.failed(error)
        if self.ending:
            self.finished()
        elif queued:
            self.consumed(queued)

    def finish(self):
        self.ending = True
        if not self.queue:
            self._rest()

    def close(self):
        if not self.done:
            self.done = True
            self.loop.watch(self.fd)


class CopySink(Sink):
    """A job's pipe that gets a copy first.  It holds one page: with anything in it nobody can write until its reader
    has taken all of it; then emptied() is called, once, and the pipe may hold `size` bytes."""

    def __init__(self, loop, fd, *calls, emptied, size=PIPE_FULL):
        super().__init__(loop, fd, *calls)
        self.emptied = emptied
        self.size = size
        resize_pipe(fd, COPY_MAX)

    def feed(self, view):
        kept = super().feed(view)
        if not self.queue and not self.done:
            self.watch_other_side()
        return kept

    def watch_other_side(self):
        self.loop.watch(self.fd, read=self._reader_gone,
                        write=self._writable_again if self.emptied and self.written else None)

    def _writable_again(self):
        if unread_bytes(self.fd) == 0 and not self.ending:
            emptied, self.emptied = self.emptied, None
            resize_pipe(self.fd, self.size)
            self.watch_other_side()
            emptied()


class SocketSink(Sink):
    def __init__(self, loop, fd, *calls):
        self.socket = socket.socket(fileno=os.dup(fd))
        super().__init__(loop, self.socket.fileno(), *calls)
        self.enlarged = True

    def _write(self, view):
        return self.socket.send(view, socket.MSG_DONTWAIT)

    def close(self):
        super().close()
        self.socket.close()


class CopySocketSink(SocketSink):
    """A job's socket that gets a copy first; a SocketCount looks when the job reads it."""

    def __init__(self, loop, fd, *calls, count):
        super().__init__(loop, fd, *calls)
        self.count = count
        count.sink = self

    def feed(self, view):
        kept = super().feed(view)
        self.count.look_soon()
        return kept


class SharedSink(Sink):
    """A pipe, terminal or device that others may share.  What the system takes when asked not to wait (RWF_NOWAIT) it
    gets so; for what does not know that, a helper thread writes and may block as long as it likes."""
    CHUNK = 1 << 18

    def __init__(self, loop, fd, *calls):
        super().__init__(loop, fd, *calls)
        self.threaded, self.helper = RWF_NOWAIT is None, Helper(loop)
        self.watch_other_side()

    def _write(self, view):
        if not self.threaded:
            try:
                return os.pwritev(self.fd, [view], -1, RWF_NOWAIT)
            except OSError as error:
                if error.errno not in UNSUPPORTED:
                    raise
                self.threaded = True
        return 0

    def _wait(self):
        if not self.threaded:
            return super()._wait()
        self.loop.watch(self.fd)
        self.helper.call(functools.partial(self._write_all, self.queue[0]), self._thread_wrote)

    def _write_all(self, view):
        view = memoryview(view)
        while len(view):
            try:
                view = view[os.write(self.fd, view[:self.CHUNK]):]
            except BlockingIOError:     # somebody else set O_NONBLOCK on it
                wait_for(self.fd, select.POLLOUT)
            except OSError as error:
                return error
        return None

    def _thread_wrote(self, error):
        if self.done:
            return
        if error:
            self._fail(error)
            return
        size = len(self.queue.popleft())
        self.written += size
        if self.queue:
            self._wait()
        self.consumed(size)
        if not self.queue:
            self._rest()

    def close(self):
        super().close()
        self.helper.end()


class TerminalSink(SharedSink):
    """The user's terminal.  before() is called ahead of whatever the job writes there."""

    def __init__(self, loop, fd, *calls, before):
        super().__init__(loop, fd, *calls)
        self.before = before

    def feed(self, view):
        self.before()
        return super().feed(view)


def open_sink(loop, fd, *calls):
    kind = stream_kind(fd)
    if kind is REGULAR or (kind is DEVICE and is_memory(fd)):
        return Sink(loop, fd, *calls)
    return (SocketSink if kind is SOCKET else SharedSink)(loop, fd, *calls)


# ---------------------------------------------------------------- channel

class Channel:
    """Moves bytes between one TlsConnection, its session and the sources of a job, for one owner at a time.

    The owner has these methods, which are called in the loop:
    on_message(kind, number, body)   what the session does not settle by itself; the body as the session parsed it
    on_data(number, view)            data for a descriptor; returns whether the view is kept, so that its buffer must
                                     not be used again
    on_source_end(number)            a source was at its end; it is closed, and the peer will hear of it
    on_read_error(number, error)     a source cannot be read; returns 0 to end it, or None to leave it for now
    on_lost(loss)                    the connection ended, and the session was not over; called once
    Several jobs may use one channel in turn: reset_streams() ends a job's part, `owner` may be set to the next one's.
    """
    ROUNDS = 8              # buffers per call, so that a fast peer does not starve timers and signals
    SLICE = 0.05            # seconds per call, for one whose messages take long
    TICK = 0.25             # the silence clock looks at least so often, seconds, and at a quarter of the timeout

    def __init__(self, loop, connection, session, owner):
        self.loop, self.connection, self.session, self.owner = loop, connection, session, owner
        self.fd = connection.fileno()
        self.incoming = memoryview(bytearray(BUFFER_START))
        self.messages = None                            # those in `incoming` that have not been acted on, an iterator
        self.received = 0                               # bytes that came into it
        self.kept = False                               # whether somebody keeps a view of it
        self.outgoing = bytearray(BUFFER_START)
        self.pending = memoryview(b"")                  # of `outgoing`, or the one before: not given to TLS yet
        self.sources = {}
        self.ready = collections.OrderedDict()          # numbers of sources that may have something to read, in turn
        self.starved = set()                            # numbers of sources that wait for credit
        self.on_ended = None                            # called once, when the peer goes after the session was over
        self.on_flushed = None                          # called once, when the system has taken all there was to send
        self.closed = self.filling = self.blocked = self.processing = self.coming_back = False
        self.send_failure = None                        # the Loss, when nothing can be sent any more
        self.sent_total = self.received_total = 0       # bytes of data
        self.timer = loop.call_later(0, self.tick)      # nothing is sent before the owner has what the events may need
        loop.watch(self.fd, read=self._readable)
        self._come_back()       # the handshake may have decrypted more than its own

    # -- sources
    def add_source(self, number, source):
        """The caller flushes when all are there."""
        self.sources[number] = source
        self.ready[number] = True

    def source_ready(self, number):
        """A source that had nothing to read has something now."""
        if number in self.sources and number not in self.starved:
            self.ready[number] = True
            self.flush()

    def drop_source(self, number):
        source = self.sources.pop(number, None)
        if source:
            self.ready.pop(number, None)
            self.starved.discard(number)
            source.close()

    def reset_streams(self):
        """The job is over: lets go of its sources.  What its sinks still report as consumed must not come here."""
        for number in list(self.sources):
            self.drop_source(number)
        self.sent_total = self.received_total = 0

    def consumed(self, number, size):
        """So much of a descriptor's data has left this process."""
        if not self.closed:
            self.session.consumed(number, size, time.monotonic())
            if self.session.outbox and not self.processing:
                self.flush()

    # -- to the peer
    def flush(self):
        """Sends what there is to send, as far as the connection takes it now."""
        if self.closed or self.filling or self.blocked:
            return
        try:
            taken = self.connection.flush()
            for _ in range(self.ROUNDS):
                if not taken:
                    break
                if not self.pending and not self._fill():
                    if self.on_flushed:
                        callback, self.on_flushed = self.on_flushed, None
                        callback()
                    return
                while taken and self.pending:
                    piece, self.pending = self.pending[:TLS_PIECE], self.pending[TLS_PIECE:]
                    taken = self.connection.send(piece)
        except (OSError, ValueError) as error:
            self.blocked, self.send_failure = True, loss_of(error)
            self.connection.emptied = False
            self._come_back()       # what came in before the end is still heard
            return
        self.blocked = True
        self.loop.watch(self.fd, read=self._readable, write=self._writable)

    def _writable(self):
        self.blocked = False
        self.loop.watch(self.fd, read=self._readable)
        self.flush()

    def _fill(self):
        """Gathers messages into the buffer: control first, then data of the descriptors in turn."""
        session, at = self.session, 0
        self.filling = True         # a source's end must not start a second filling inside this one
        try:
            at = self._take_control(0)
            while self.ready and len(self.outgoing) - at >= 4096:      # a short input and its end go out together
                at = self._take_data(self.ready.popitem(last=False)[0], at)
            if session.outbox and at < len(self.outgoing):
                at = self._take_control(at)     # ends that the sources came to
        finally:
            self.filling = False
        self.pending = memoryview(self.outgoing)[:at]
        if BUFFER_START == len(self.outgoing) < at + 4096:
            self.outgoing = bytearray(BUFFER)
        return at

    def _take_control(self, at):
        self.session.repay(time.monotonic())
        part = self.session.outbox[:len(self.outgoing) - at]
        self.outgoing[at:at + len(part)] = part
        del self.session.outbox[:len(part)]
        return at + len(part)

    def _take_data(self, number, at):
        """One read of one source behind its header's place; returns where the next message begins."""
        start = at + HEAD_SIZE
        room = min(self.session.may_send(number), len(self.outgoing) - start)
        if room <= 0:
            self.starved.add(number)
            return at
        if room > RECORD:       # whole records: a short one at the end costs as much as a full one
            room -= (start + room) % RECORD
        try:
            size = self.sources[number].read_into(memoryview(self.outgoing)[start:start + room])
        except OSError as error:
            size = self.owner.on_read_error(number, error)
        if size:
            self.session.data(self.outgoing, at, number, size)
            self.sent_total += size
            self.ready[number] = True
            return start + size
        if size == 0 and number in self.sources:
            self.drop_source(number)
            self.session.end(number)
            self.owner.on_source_end(number)
        return at

    # -- from the peer
    def _come_back(self):
        """What TLS holds, or is left of a buffer, wakes no select."""
        if not self.coming_back:
            self.coming_back = True
            self.loop.call_soon_threadsafe(self._back)

    def _back(self):
        self.coming_back = False
        self._readable()

    def _readable(self):
        """Acts on what has come, a few buffers and a slice of time: then others have their turn."""
        if self.closed or self.coming_back:
            return
        until = time.monotonic() + self.SLICE
        for _ in range(self.ROUNDS // 2):
            if not (self.messages or self._receive()) or not self._process(until):
                break
            if self.received < len(self.incoming) and not (self.connection.failure or self.send_failure):
                break
        else:
            self._come_back()
        self.flush()

    def _receive(self):
        """Takes in one buffer; returns whether anything has come."""
        if self.kept or self.received == len(self.incoming) == BUFFER_START:
            self.incoming, self.kept = memoryview(bytearray(BUFFER)), False
        try:
            size = self.connection.read_into(self.incoming)
        except (OSError, ValueError) as error:
            self.fail(loss_of(error))
            return False
        if size:
            self.received = size
            self.messages = self.session.receive(self.incoming[:size], time.monotonic())
        elif size == 0:
            self.fail(Loss(CLOSED, "the connection was closed"))
        elif self.send_failure:
            self.fail(self.send_failure)
        return bool(size)

    def _process(self, until):
        """Acts on what is left of one buffer; returns whether it has come to its end, with the channel open.  Behind
        the last word of either side nothing counts."""
        self.processing = True      # what is given back goes out together, at the end
        try:
            for kind, number, body in self.messages if self.session.phase is not OVER else ():
                if kind == DATA:
                    self.received_total += len(body)
                    self.kept = self.owner.on_data(number, body) or self.kept
                elif kind == CREDIT:
                    if number in self.starved:
                        self.starved.discard(number)
                        self.ready[number] = True       # flush follows
                else:
                    self.owner.on_message(kind, number, body)
                if self.closed:
                    return False
                if time.monotonic() > until:
                    self._come_back()
                    return False
        except ProtocolError as error:
            self.fail(Loss(PROTOCOL, "protocol broken: %s" % error))
            return False
        finally:
            self.processing = False
        self.messages = None
        return True

    # -- silence and the end
    def tick(self):
        """Looks at the silence clock, now and from now on."""
        if self.closed:
            return
        self.timer.cancel()
        now = time.monotonic()
        if self.session.tick(now):
            return self.fail(Loss(SILENT, "silent for %g seconds" % self.session.timeout))
        self.timer = self.loop.call_at(now + max(self.TICK, min(15, self.session.timeout / 8)), self.tick)
        self.flush()

    def fail(self, loss):
        """Ends the connection for the reason given, which the owner hears unless the session was over."""
        if not self.closed:
            over = self.session.phase is OVER and loss.kind is not PROTOCOL
            self.close()
            if not over:
                self.owner.on_lost(loss)
            elif self.on_ended:
                self.on_ended()

    def close(self):
        """Ends the connection at once; what is queued for local descriptors stays with its sinks."""
        if self.closed:
            return
        self.closed = True
        self.timer.cancel()
        self.loop.watch(self.fd)
        for number in list(self.sources):
            self.drop_source(number)
        self.connection.close()


# ---------------------------------------------------------------- children

KILL_GRACE = 2.0            # seconds a job's group has between TERM and KILL
KILL_LOOK = 0.02            # seconds between two looks at what is left of it
JOB_DESCRIPTORS_MAX = 1024
PIPES_MAX = 1 << 24         # bytes that the system may hold for a job's descriptors together
SOCKET_FULL = 1 << 18       # what a socket pair holds by default, about


def spawn(path, command, environment, ends, terminal=None, limits=()):
    """Starts the job as the leader of a session of its own; returns its pid.

    ends: {descriptor in the job: descriptor here}; every other descriptor is closed.  terminal: a descriptor that
    becomes the controlling terminal.  limits: [(name, value)] for set_limit.
    OSError when the system refuses to run it.
    """
    if terminal is None and not limits and hasattr(os, "posix_spawn"):
        try:
            return _spawn_at_once(path, command, environment, ends)
        except NotImplementedError:
            pass        # a C library without setsid there
    return _spawn_by_fork(path, command, environment, ends, terminal, limits)


def _spawn_at_once(path, command, environment, ends):
    """posix_spawn copies no page tables: 0.2 ms where fork takes 2.5.  It sets neither terminal nor limits."""
    above, moved = max(max(ends, default=0), 2) + 1, {}
    try:
        for fd, end in ends.items():        # first out of the way of the numbers that the job wants
            moved[fd] = end if end >= above else duplicate(end, above)
        actions = [(os.POSIX_SPAWN_DUP2, other, fd) for fd, other in moved.items()]
        actions += [(os.POSIX_SPAWN_CLOSE, fd) for fd in range(3) if fd not in ends and is_open(fd)]
        return os.posix_spawn(path, command, environment, file_actions=actions, setsid=True, setsigmask=(),
                              setsigdef=RESETTABLE)
    finally:
        for fd, other in moved.items():
            if other != ends[fd]:
                os.close(other)


RESETTABLE = frozenset(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}


def _spawn_by_fork(path, command, environment, ends, terminal, limits):
    report_in, report_out = os.pipe()
    try:
        pid = os.fork()
    except OSError:
        os.close(report_in)
        os.close(report_out)
        raise
    if pid == 0:
        _become(path, command, environment, ends, terminal, limits, report_out)
    os.close(report_out)
    with open(report_in, "rb", 0) as report:
        words = report.read(16)
    if words:
        os.waitpid(pid, 0)
        raise OSError(int(words), os.strerror(int(words)))
    return pid


def _become(path, command, environment, ends, terminal, limits, report):
    """In the forked child: turns into the job, or reports errno and ends.  Nothing here may raise or return."""
    try:
        os.setsid()
        for number in RESETTABLE:
            try:
                signal.signal(number, signal.SIG_DFL)
            except (OSError, ValueError):
                pass        # one that the C library keeps for itself
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        if terminal is not None:
            import termios
            fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
        report = _place_descriptors(ends, report)
        for name, value in limits:
            set_limit(name, value)
        os.execve(path, command, environment)
    except BaseException as error:
        os.write(report, b"%d" % (getattr(error, "errno", None) or errno.EINVAL))
    os._exit(127)


WALL = "wall"               # a limit that no system knows: seconds from a job's start


def set_limit(name, value):
    """Lowers a resource limit of this process for good; one that is lower already stays."""
    import resource
    kind = {"cpu": resource.RLIMIT_CPU, "memory": resource.RLIMIT_AS, "file": resource.RLIMIT_FSIZE,
            "processes": resource.RLIMIT_NPROC}[name]
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    # Past the soft limit of CPU time comes XCPU, which may be caught; past the hard one, KILL.
    resource.setrlimit(kind, (value, value + 1 if name == "cpu" and value != hard else value))


def _place_descriptors(ends, report):
    """Puts every end where the job wants it; returns the report pipe's number, moved out of the way."""
    above = max(max(ends, default=0), 2) + 1
    moved = {fd: duplicate(end, above) for fd, end in ends.items()}
    report = duplicate(report, above)
    for fd in range(above):
        if fd in moved:
            os.dup2(moved[fd], fd, inheritable=True)
        else:
            try:
                os.close(fd)        # the standard ones are inherited; the rest closes at exec anyhow
            except OSError:
                pass
    return report


def has_ended(pid):
    """Whether this child of ours has ended.  It stays a zombie, which keeps its number from being used again."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


CAN_PEEK = hasattr(os, "waitid")        # macOS has it from Python 3.13 on


def signal_group(group, number):
    """Sends a signal to every process of the group; returns whether there was any."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass        # some of them have changed their user; macOS says so for zombies too
    return True


class OwnChildren:
    """This process's children, those included that it inherits as a subreaper (Linux).  Whoever makes it is the one
    that waits for them, so their numbers are their own until then."""

    def __init__(self):
        try:
            self.fd = os.open("/proc/self/task/%d/children" % os.getpid(), os.O_RDONLY)
        except OSError:
            self.fd = None          # not Linux, or a kernel without this file

    def pids(self):
        if self.fd is None:
            return self._search()
        data = part = os.pread(self.fd, 1 << 16, 0)
        while part:
            part = os.pread(self.fd, 1 << 16, len(data))
            data += part
        return list(map(int, data.split()))

    def _search(self):
        """The same by looking at every process; none where there is no /proc as Linux has it."""
        found, own = [], b"%d" % os.getpid()
        for name in process_ids():
            try:
                with open("/proc/%s/stat" % name, "rb") as file:
                    if file.read().rpartition(b")")[2].split()[1] == own:
                        found.append(int(name))
            except (OSError, IndexError):
                pass        # it has ended
        return found


PR_SET_CHILD_SUBREAPER = 36     # linux/prctl.h
PR_SET_DUMPABLE = 4


def prctl(option, value):
    """Where there is such a call (Linux)."""
    try:
        import ctypes
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
    except (ImportError, OSError, AttributeError):
        pass


def become_subreaper():
    """Whatever loses its parent below this process becomes its child, and so ends with the job that it came from."""
    if LINUX:
        prctl(PR_SET_CHILD_SUBREAPER, 1)


def hide_memory():
    """Keeps this process's memory, and so the key, from other processes of its user, such as its jobs (Linux); else the
    manual tells to use --user."""
    if LINUX:
        prctl(PR_SET_DUMPABLE, 0)


def is_reaped(pid):
    """Waits for this child if it has ended; whether it has, now or before."""
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return True


def signal_all(pids, number):
    """Sends a signal to these processes, and to everybody in their process groups but this one's own."""
    groups = set(map(group_of, pids)) - {os.getpgrp()}
    for pid in pids:
        signal_process(pid, number)     # it may change its group just now
    for group in groups:
        signal_group(group, number)


def signal_process(pid, number):
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        pass        # it has ended, or changed its user


def group_of(pid):
    """Where only a group is left, its number stands for its leader's."""
    try:
        return os.getpgid(pid)
    except OSError:
        return pid


class JobKill:
    """Ends what is left of a job: TERM, HUP and CONT (for the stopped) to each process group as it comes to light, and
    after a grace STOP and then KILL, again and again, until nothing is left.

    left: a function, the pids of what is left: children of this process, which waits for those that have ended.  look()
    is called, KILL_LOOK seconds apart, until it returns True.  A child's children become ours when it has gone.
    """
    ROUNDS = 20             # in one look, against those that beget others meanwhile

    def __init__(self, left):
        self.left = left
        self.deadline = time.monotonic() + KILL_GRACE
        self.told = set()       # pids and groups that have been asked to end

    def look(self):
        """Whether it is over."""
        pids = self.left()
        if time.monotonic() >= self.deadline:
            for _ in range(self.ROUNDS):
                signal_all(pids, signal.SIGSTOP)
                signal_all(pids, signal.SIGKILL)
                pids = self.left()
                if not pids:
                    break
        else:
            self._ask(pids)
        return not pids

    def _ask(self, pids):
        new = [pid for pid in pids if pid not in self.told and group_of(pid) not in self.told]
        self.told.update(new, map(group_of, new))
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGCONT) if new else ():
            signal_all(new, number)

    def kill(self):
        """At once."""
        self.deadline = 0.0
        self.look()


def process_ids():
    """The pids, as text, of all processes that can be seen; none where there is no /proc as Linux has it."""
    try:
        return [name for name in os.listdir("/proc") if name.isdigit()] if LINUX else []
    except OSError:
        return []


def become_user(user):
    """Gives up root for good, with all its groups."""
    os.initgroups(user.pw_name, user.pw_gid)
    os.setgid(user.pw_gid)
    os.setuid(user.pw_uid)


def close_strays(*kept):
    """Whatever was inherited beside the standard three is nobody's business here, nor in the jobs."""
    try:
        highest = max(int(name) for name in os.listdir("/dev/fd"))
    except (OSError, ValueError):
        highest = FD_SETSIZE
    if not LINUX and not MACOS:         # there the folder may list the first few only
        highest = max(highest, min(os.sysconf("SC_OPEN_MAX"), 1 << 20))
    start = 3
    for fd in sorted(kept) + [highest + 1]:
        os.closerange(start, fd)
        start = fd + 1


def call_as(user, call, *kept):
    """The pid of a forked child that calls, with the rights of that user if one is given, and ends with 0, or with the
    number of the error that was raised.  Of descriptors it has the standard ones and those that are to be kept."""
    pid = os.fork()
    if pid:
        return pid
    status = errno.EIO
    try:
        for number in signal.SIGTERM, signal.SIGINT, signal.SIGHUP:
            signal.signal(number, signal.SIG_IGN)       # they are for its parent
        close_strays(*kept)
        if user:
            become_user(user)
        call()
        status = 0
    except OSError as error:
        status = error.errno or errno.EIO
    finally:
        os._exit(status)


def errno_as(user, call):
    """The same, waited for: the number of the error, or 0."""
    return os.waitpid(call_as(user, call), 0)[1] >> 8


def can_read(path, user):
    """Whether this user can read a file that this process has read; None for this process's own."""
    return not (user and errno_as(user, lambda: open(path, "rb").close()))


# ---------------------------------------------------------------- terminals

CONTROL_CHARACTERS = ("VINTR VQUIT VERASE VKILL VEOF VEOL VEOL2 VSTART VSTOP VSUSP VREPRINT VWERASE VLNEXT "
                      "VDISCARD").split()
MODE_FLAGS = {0: "IXON IXOFF IXANY ICRNL INLCR IGNCR ISTRIP IUTF8 IMAXBEL".split(),
              1: "OPOST ONLCR OCRNL ONLRET".split(),
              3: "ISIG ICANON ECHO ECHOE ECHOK ECHONL ECHOCTL ECHOKE IEXTEN NOFLSH TOSTOP".split()}


def terminal_modes(fd):
    """{name: number} of a terminal's control characters and flags: names, because every system numbers them its way."""
    import termios
    attributes, known = termios.tcgetattr(fd), vars(termios)
    modes = {name.encode(): ord(attributes[6][known[name]]) for name in CONTROL_CHARACTERS if name in known}
    modes.update((name.encode(), int(bool(attributes[field] & known[name])))
                 for field, names in MODE_FLAGS.items() for name in names if name in known)
    return modes


def set_terminal(fd, rows, columns, modes):
    """Makes a terminal like the one that terminal_modes described; names that this system does not know are left."""
    import termios
    attributes, known = termios.tcgetattr(fd), vars(termios)
    for name in CONTROL_CHARACTERS:
        if name in known and name.encode() in modes:
            attributes[6][known[name]] = bytes([modes[name.encode()]])
    for field, names in MODE_FLAGS.items():
        for name in names:
            bit, wanted = known.get(name, 0), modes.get(name.encode())
            if wanted is not None:
                attributes[field] = attributes[field] | bit if wanted else attributes[field] & ~bit
    termios.tcsetattr(fd, termios.TCSANOW, attributes)
    set_window(fd, rows, columns)


def set_window(fd, rows, columns):
    """Tells a terminal its size; its foreground processes get WINCH."""
    import termios
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def set_modes(change):
    """Calls change(), which sets a terminal's modes, once more whenever a signal comes in between: termios does not do
    that by itself.  termios.error when the terminal has gone."""
    import termios
    while True:
        try:
            return change()
        except termios.error as error:
            if error.args[0] != errno.EINTR:
                raise


class LocalTerminal:
    """The user's terminal while a job uses it.

    tty      a descriptor of it, or None (-tt from a script)
    number   the lowest of the standard descriptors that are the terminal in the job
    reading, writing    the local descriptors behind it; reading is None when standard input is something else
    """

    def __init__(self, settings, descriptors):
        self.saved = None
        numbers = [fd for fd in (0, 1, 2) if fd in descriptors and os.isatty(fd)]
        if not numbers and settings.terminal < 2:
            raise Failure("-t", "none of standard input, output and error is a terminal",
                          "-tt gives the job a terminal all the same", EXIT_USAGE)
        self.tty = numbers[0] if numbers else None
        numbers = numbers or [fd for fd in (0, 1, 2) if fd in descriptors] or [0]
        self.number, self.reading = numbers[0], 0 if 0 in numbers and 0 in descriptors else None
        outputs = [fd for fd in numbers if fd in descriptors and access_of(fd) is not IN]
        self.writing = next((fd for fd in (1, 2, 0) if fd in outputs), None)
        for fd, kind in list(descriptors.items()):
            if fd in numbers or (isinstance(kind, int) and kind in numbers):    # 3>&1 is the terminal too
                descriptors[fd] = self.number
        descriptors[self.number] = TTY

    def describe(self):
        modes = terminal_modes(self.tty) if self.tty is not None else {}
        return (*self.size(), os.environb.get(b"TERM", b"dumb")[:64], modes)

    def size(self):
        """(rows, columns)"""
        try:
            return os.get_terminal_size(self.tty)[::-1]
        except (OSError, TypeError):
            return 24, 80

    def raw(self):
        """From here on every key goes to the job."""
        import termios
        import tty
        if self.tty is None or self.reading is None or not self.is_ours():
            return
        try:
            self.saved = self.saved or termios.tcgetattr(self.tty)
            set_modes(lambda: self.is_ours() and tty.setraw(self.tty, termios.TCSADRAIN))
        except termios.error:
            pass        # it has been hung up; reading will tell

    def restore(self):
        """As it was, unless it is somebody else's by now."""
        import termios
        saved, self.saved = self.saved, None
        try:
            set_modes(lambda: saved and self.is_ours() and termios.tcsetattr(self.tty, termios.TCSADRAIN, saved))
        except termios.error:
            pass        # it has been hung up

    def is_ours(self):
        """Whether this process is in the foreground; a terminal that controls nobody here has no background."""
        try:
            return self.tty is None or os.tcgetpgrp(self.tty) == os.getpgrp()
        except OSError as error:
            return error.errno == errno.ENOTTY


class TypedInput(Input):
    """What the user types, less the commands to cexec, which go to on_command(name).

    From start() to stop(), while the job has the terminal, it is read whether or not the worker takes it: else one that
    takes nothing would keep the user from every command.  on_error(error) tells what a terminal that cannot be read is
    taken for: 0 its end, None nothing yet.
    """
    MOST = 1 << 20          # bytes that wait for the worker

    def __init__(self, loop, fd, ready, character, on_command, on_error):
        self.loop = loop
        if stream_kind(fd) is TERMINAL:
            self.live = TerminalSource(loop, fd, self._typed, stops=True)
        else:
            self.live = open_source(loop, fd, self._typed)
        self.ready = ready
        self.escapes = EscapeFilter(character)
        self.on_command = on_command
        self.on_error = on_error
        self.view = memoryview(bytearray(4096))
        self.buffer = bytearray()
        self.reading = False
        self.wanted = True              # by the job
        self.ended = False
        self.touched = False

    def start(self):
        self.reading = True
        self._typed()

    def stop(self):
        self.reading = False

    def _typed(self):
        while self.reading and not self.ended and len(self.buffer) < self.MOST:
            try:
                size = self.live.read_into(self.view)
            except OSError as error:
                size = self.on_error(error)
            if size is None:
                break
            self.ended = size == 0
            typed, commands = self.escapes.filter(bytes(self.view[:size]))
            self.buffer += typed if self.wanted else b""
            for command in commands:
                self.loop.call_soon_threadsafe(functools.partial(self.on_command, command))
        self.ready()

    def read_into(self, view):
        size = min(len(view), len(self.buffer))
        if not size:
            return 0 if self.ended else None
        if len(self.buffer) >= self.MOST:
            self.loop.call_soon_threadsafe(self._typed)
        view[:size] = self.buffer[:size]
        del self.buffer[:size]
        self.touched = True
        return size

    def can_rewind(self):
        return not self.touched

    def commit(self, consumed):
        """The job takes nothing more; the commands are still heard."""
        self.wanted = False
        self.buffer.clear()
        return True

    def end(self):
        self.live.close()


class JobTerminalSink(Sink):
    """The keyboard's side of a job's terminal.  The end of what is typed is the terminal's own end character, twice
    behind an unfinished line."""

    def __init__(self, loop, fd, *calls):
        super().__init__(loop, os.dup(fd), *calls)
        self.last = b"\n"

    def feed(self, view):
        if len(view):
            self.last = bytes(view[-1:])
        return super().feed(view)

    def finish(self):
        import termios
        modes = termios.tcgetattr(self.fd)
        if modes[3] & termios.ICANON:
            end = modes[6][termios.VEOF]
            self.feed(end if self.last in (b"\n", b"\r", end) else end * 2)
        super().finish()

    def close(self):
        if not self.done:
            super().close()
            os.close(self.fd)


def in_background(fd):
    """Whether another process group has this terminal: reading it would stop this process."""
    try:
        return os.tcgetpgrp(fd) != os.getpgrp()
    except OSError:
        return False        # no terminal, or not that of this session


def stop_reading_group():
    """What the system does to the process group of one that reads its terminal from the background."""
    if signal.getsignal(signal.SIGTTIN) is not signal.SIG_IGN:
        os.kill(0, signal.SIGTTIN)


def wake_for_signals():
    """Starts a process that continues this one, while it is stopped, for a signal that ends it: the kernel keeps TERM
    for a stopped process until then, and with it the worker's slot.  Returns its pid, or None (Linux only).

    A program of its own: to fork would be wrong where helper threads run."""
    ends = sum(1 << number - 1 for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT))
    closed = [(os.POSIX_SPAWN_CLOSE, fd) for fd in open_descriptors(FD_SETSIZE)] if LINUX else []
    try:
        return os.posix_spawn(sys.executable or "", [sys.executable, "-ISc", WAKER, str(os.getpid()), str(ends)], {},
                              file_actions=closed, setpgroup=0) if LINUX else None
    except OSError:
        return None


WAKER = """\
import os, signal, sys, time
stopped, ends = map(int, sys.argv[1:])
while os.getppid() == stopped:
    with open("/proc/%d/status" % stopped) as file:
        pending, = [int(line.split()[1], 16) for line in file if line.startswith("ShdPnd:")]
    if pending & ends:
        os.kill(stopped, signal.SIGCONT)
    time.sleep(0.1)
"""


def has_lost_terminal():
    """Whether the controlling terminal is another process group's at the moment."""
    try:
        with open("/dev/tty") as terminal:
            return in_background(terminal.fileno())
    except OSError:
        return False


# ---------------------------------------------------------------- discovery: from an announcement to proven workers

CONNECTIONS_MAX = 256       # connections at once at a submitter's port; a stranger's flood ends there
REASONS_MAX = 20            # workers and strangers whose failures are remembered for the last line
INSTANCES_MAX = 4096        # workers whose last HERE is remembered, so that no copy counts


def worker_name(own, address):
    """Who a worker is: the address of its connection or datagram.  Its own word only says who it is behind a proxy."""
    bare = address.partition("%")[0]
    return address if own in (bare, address) else "%s by %s" % (own, address)


class WorkerConnection:
    """A connection that came in after an announcement: a worker, if it can show it.

    It says its preamble in plain, waits for GO, and shows the rest of itself in TLS.  Discovery makes it and closes it,
    or hands it over when it is taken: `address` is its TCP address, `name` what it is called, `instance` which run of
    cservice it is, `submitter` our address as it sees it, `answer` its preamble's, `session` is in phase IDLE,
    `connection` is what to read and write.
    """
    PATIENCE = 10.0         # seconds for everything up to the worker's hello

    def __init__(self, discovery, connection, address, listed):
        self.discovery, self.loop = discovery, discovery.loop
        self.address = self.name = address
        self.listed = listed        # whether the user's lists let a worker at this address be used
        self.connection = connection
        self.preamble = b""
        self.answer = None          # with it, the key's holder has spoken, or a copy of what he said
        self.submitter = ""
        self.instance = None
        self.sees_reading = False
        self.session = None
        self.closed = False
        self.timer = self.loop.call_later(self.PATIENCE, lambda: self.close("silent in the handshake"))
        self.loop.watch(connection.fileno(), read=self._read_preamble)

    def _read_preamble(self):
        try:
            self.preamble = receive_up_to(self.connection, self.preamble, PREAMBLE_SIZE)
            if len(self.preamble) < PREAMBLE_SIZE and preamble_may_follow(self.preamble, self.discovery.nonce):
                return
            answer, random = parse_preamble(self.discovery.key.udp, self.discovery.nonce, self.preamble)
            if not self.listed:
                self.connection.send(encode_go(self.discovery.key.udp, self.preamble, wanted=False))
                return self.close("excluded by CEXEC_ACCEPT_SERVER or CEXEC_REJECT_SERVERS", failed=False)
        except (OSError, EOFError, ProtocolError) as error:
            return self.close(reason_of(error))
        self.answer = answer
        self.loop.watch(self.connection.fileno(), read=self._too_early)
        self.discovery.connected(self, random)

    def _too_early(self):
        """Nothing may come before GO but the end."""
        try:
            reason = ("it spoke before it was asked to" if self.connection.recv(1) else
                      "it closed the connection before the handshake")
        except BlockingIOError:
            return
        except OSError as error:
            reason = reason_of(error)
        self.close(reason)

    def start_handshake(self):
        """It is this one's turn: tells it to go ahead, as the TLS server."""
        self.loop.watch(self.connection.fileno())
        try:
            tune(self.connection)
            self.submitter = self.connection.getsockname()[0].partition("%")[0]
            self.connection.send(encode_go(self.discovery.key.udp, self.preamble))  # both sides now make ready at once
            self.connection = TlsConnection(self.connection, self.discovery.owner.context(), server_side=True)
        except (OSError, ValueError) as error:
            return self.close(loss_of(error).words)
        self.loop.watch(self.connection.fileno(), read=self._continue_handshake)

    def _continue_handshake(self):
        fd, go_on = self.connection.fileno(), self._continue_handshake
        try:
            if not self.connection.handshake():
                return self.loop.watch(fd, read=go_on, write=go_on if self.connection.unsent else None)
            check_peer(self.connection.tls, self.discovery.key)
        except (OSError, ValueError) as error:
            if self.connection.barren:
                return self.close(loss_of(error).words)
            return self.close("busy: it has given its slot to another search meanwhile", failed=False)
        self.discovery.owner.on_proven()
        self.session = Session(SUBMITTER, self.discovery.settings.timeout_pingpong, time.monotonic())
        self.loop.watch(fd, read=self._read_hello)
        self._read_hello()

    def _read_hello(self):
        """Reads up to the worker's hello, which also proves that its process is awake."""
        buffer = memoryview(bytearray(CONTROL_MAX))
        try:
            size = self.connection.read_into(buffer)
            if size == 0:
                return self.close("closed in the handshake")
            # All of it before the job is offered: nothing but an abort may follow the hello unasked.
            said = {kind: body for kind, _, body in self.session.receive(buffer[:size or 0], time.monotonic())}
            if ABORT in said:
                self.close(said[ABORT], failed=False)       # it is there, and has no slot
            elif HELLO in said:
                self._hello(said[HELLO])
        except (OSError, ValueError) as error:
            self.close(loss_of(error).words)
        except ProtocolError as error:
            self.close("protocol broken: %s" % error)

    def _hello(self, body):
        own, self.instance, self.sees_reading, host = parse_hello(body)
        self.name = worker_name(own, self.address)
        if not is_wanted(self.discovery.settings, self.address, own, host):
            self.session.bye(never=True)
            if self.connection.flush():
                self.connection.send(self.session.outbox)
            self.close("excluded by CEXEC_REJECT_SERVERS", failed=False)
        elif self.discovery.owner.avoids(self.instance, self.address):
            self.close("it has failed this job already")
        else:
            self.discovery.authenticated(self)

    def take(self):
        """Hands the connection over to the caller of this, who reads and closes it from now on."""
        self.timer.cancel()
        self.closed = True
        self.loop.watch(self.connection.fileno())
        return self.connection

    def close(self, why, failed=True):
        """failed: whether the worker is to blame."""
        if self.closed:
            return
        self.take().close()
        self.discovery.gone(self, why, failed)


class AnswerPort:
    """What a submitter sends from, and what comes back to it, datagrams and connections, by one number; for one search
    after another.  Whoever makes it closes it.

    search: the Discovery that hears what comes, or None.
    """

    def __init__(self, loop, settings):
        self.loop = loop
        self.socket, listener = open_ports(settings.group, settings.listen_ports)
        self.acceptor = Acceptor(loop, listener, self._accept)
        self.number = self.acceptor.port
        self.search = None
        loop.watch(self.socket.fileno(), read=self._read)

    def _accept(self, connection, address):
        if self.search:
            self.search.accept(connection, address[0])
        else:
            connection.close()

    def _read(self):
        for data, source, _ in self.socket.datagrams():
            if self.search:
                self.search.hear(data, source)

    def close(self):
        self.acceptor.close()
        self.loop.watch(self.socket.fileno())
        self.socket.close()


class Discovery:
    """One search for workers: announcement, candidates, choice.  Its owner, a Pool, makes it, and stops it unless it is
    over.  The owner has loop, key and settings, and:

    id                 8 bytes that name the submitting process
    context()          returns the TLS context
    wanted()           how many slots can be used now
    avoids(instance, address)
                       whether a worker that says it is this one is not to be used now
    doubts()           whether workers that say that they are busy are to show that they have the key
    on_proven()        called for each worker that has shown it
    on_found(w)        called for each WorkerConnection that is taken
    on_heard(name, address, reason, here)
                       called for each sign of life of a worker that has the key: it connected (reason and here None),
                       it failed its handshake (reason), it said that it is busy or could not connect back (both)
    trace(text)        hears of each step

    problems: what went wrong with the last datagram sent, one text for each interface.
    reasons: {name: why the connection came to nothing}, the last ones.
    """
    IDLE = 0.01             # seconds: when nobody has come by then, there is time to prepare the channel
    LAST_WORDS = 0.02       # seconds for which a search that is over goes on to say so

    def __init__(self, owner, port):
        self.owner, self.port = owner, port
        self.loop, self.key, self.settings, self.trace = owner.loop, owner.key, owner.settings, owner.trace
        self.nonce = os.urandom(8)
        self.sequence = collections.Counter()       # by type of datagram
        self.heres = Recent(INSTANCES_MAX)          # {instance: sequence of its last HERE}
        self.problems, self.reasons = [], Recent(REASONS_MAX)
        self.tried = []                             # names of the interfaces that announcements leave by
        self.connections = {}                       # {WorkerConnection: None}, in the order of arrival
        self.stopped = False                        # nothing is said or heard any more
        self.looking = False
        self.timer = NO_TIMER
        self.selection = Selection(time.monotonic(), uniform, owner.wanted())
        self.actions = {ANNOUNCE: self._announce, HOLD: self._hold, TAKEN: self._taken,
                        HANDSHAKE: WorkerConnection.start_handshake, WIN: self._win,
                        EVICT: lambda connection, why: connection.close(why, failed=False)}
        port.search = self
        self.loop.call_later(self.IDLE, owner.context)
        self.look()

    def is_over(self):
        """Whether it takes no more workers."""
        return self.stopped or self.selection.over

    def again(self):
        """Announces now instead of when the timetable says."""
        self.selection.announce_soon(time.monotonic())
        self.look()

    def stop(self):
        """Nobody is wanted any more.  May be called again."""
        if self.stopped:
            return
        if not self.selection.over:
            self._taken(None)
        self.stopped = True
        self.timer.cancel()
        if self.port.search is self:
            self.port.search = None
        for connection in list(self.connections):
            connection.close("not needed", failed=False)

    # -- who comes
    def accept(self, connection, address):
        self._make_room()
        listed = is_wanted(self.settings, address)      # what it says of itself does not count
        self.connections[WorkerConnection(self, connection, address, listed)] = None

    def _make_room(self):
        """A worker says who it is within a round trip: of the address with the most connections that have said nothing,
        the one goes that has been silent for longest."""
        if len(self.connections) >= CONNECTIONS_MAX:
            silent = [connection for connection in self.connections if not connection.answer]
            crowd = collections.Counter(connection.address for connection in silent)
            oldest = max(silent or self.connections, key=lambda connection: crowd[connection.address])
            oldest.close("it said nothing, and others connected", failed=False)

    def hear(self, data, source):
        """A datagram has come back."""
        try:
            datagram = parse_datagram(data)
            if ((datagram.kind, datagram.nonce) == (HERE, self.nonce) and is_wanted(self.settings, source[0])
                    and datagram.authentic(self.key.udp)):
                self._here(parse_here(datagram), datagram.sequence, source[0])
        except ProtocolError:
            pass        # a stranger's

    def _here(self, here, sequence, address):
        """A worker cannot serve now, or could not connect back."""
        if sequence <= self.heres.get(here.instance, -1):
            return
        self.heres[here.instance] = sequence
        own = parse_address(here.address)
        name = worker_name(own[0], address) if own else address
        if here.state == UNREACHABLE:
            self.reasons[name] = here.text()
        else:
            self.selection.busy(time.monotonic())
        self.owner.on_heard(name, address, here.text(), here)
        self.look()

    # -- what the connections report
    def connected(self, connection, random):
        answer = connection.answer
        self.trace("%s connected: cost %.2f%s" % (
            connection.name, answer.cost, ", it had no free slot when its turn came" if answer.queued else ""))
        self.selection.connected(time.monotonic(), connection, connection.address, answer, random)
        self.owner.on_heard(connection.name, connection.address, None, None)
        self.look()

    def authenticated(self, connection):
        self.trace("%s has proven that it has the key" % connection.name)
        self.selection.authenticated(time.monotonic(), connection)
        self.look()

    def gone(self, connection, why, failed):
        self.connections.pop(connection, None)
        self.selection.closed(time.monotonic(), connection)
        self.trace("%s: connection closed: %s" % (connection.name, why))
        if not self.is_over():
            self.reasons[connection.name] = why
            if failed and connection.answer:
                self.owner.on_heard(connection.name, connection.address, why, None)
            self.look()

    # -- what the selection wants
    def look(self):
        """Does what is due.  To be called when more or fewer slots are wanted."""
        if self.stopped or self.looking:        # what an action brings about is seen behind it
            return
        self.looking = True
        while not self.stopped:
            actions = self.selection.poll(time.monotonic(), self.owner.wanted())
            if not actions:
                break
            for action, *what in actions:
                if not self.stopped:
                    self.actions[action](*what)
        self.looking = False
        self.timer.cancel()
        due = None if self.stopped else self.selection.next_due()
        if due is not None:
            self.timer = self.loop.call_at(due, self.look)
        elif self.selection.over and not self.stopped:
            self.timer = self.loop.call_later(self.LAST_WORDS, self.stop)

    def _announce(self, *fields):
        *timing, flags, wanted = fields
        flags |= TELL_BUSY | PROVE if self.owner.doubts() else 0
        self.send(ANNOUNCE, encode_announcement(Announcement(*timing, flags, self.owner.id, wanted)), self.port.number)
        self.trace("announced%s on %s by %s%s; workers connect back to TCP port %d" % (
            " again" if fields[0] else "", self.settings.group, self.ways(),
            "".join("; not sent: " + problem for problem in self.problems), self.port.number))

    def ways(self):
        """Names of the interfaces that the last datagram went out by."""
        return " ".join(filter(None, self.tried)) or "the system's choice"

    def _hold(self, seconds):
        self.send(HOLD, encode_hold(seconds))

    def _taken(self, offset):
        self.send(TAKEN, encode_taken(offset))

    def _win(self, connection):
        self.connections.pop(connection, None)
        others = [each.answer.cost for each in self.connections if each.answer]
        self.trace("%s was chosen: %s" % (connection.name, "nobody else was connected" if not others else (
            "the lowest cost of %d" if connection.answer.cost <= min(others) else
            "the first of %d that was ready, the others cost little less") % (len(others) + 1)))
        self.owner.on_found(connection)

    def send(self, kind, body, port=0):
        self.sequence[kind] += 1
        self.problems = self.port.socket.send(
            encode_datagram(self.key.udp, kind, self.key.id, self.nonce, self.sequence[kind], body, port))
        self.tried = self.port.socket.tried


def uniform():
    """A random number in (0, 1]."""
    return (int.from_bytes(os.urandom(7), "big") + 1) / (1 << 56)


# ---------------------------------------------------------------- job streams: what a job reads and writes here
#
# cexec's are the descriptors of its caller, those of an Executor are messages.  Where they are held here until the job
# has ended, as with cmap and Room, the job may start again at any moment.

class LocalFailure(Failure):
    """Something on this machine cannot be written, which the next job would need as well."""


class JobFailure(Failure):
    """Something of one job cannot be read or written on this machine: others are not concerned."""


class JobStreams:
    """What a job's descriptors are connected to here.  Its owner makes it and closes it.

    descriptors: {number in the job: IN, OUT, BOTH, TTY or the lower number it shares}
    sources, sinks: {number: Input}, {number: Output}
    held: whether what the job writes is seen by nobody before the job has ended, so that it may always start again
    attempt: the Attempt that runs the job at the moment; channel: what carries its streams, until the job has ended
    """
    held = False

    def __init__(self):
        self.descriptors = {}
        self.sources = {}
        self.sinks = {}
        self.delivered = set()          # sinks at their end
        self.attempt = None
        self.channel = None
        self.terminal = None            # a LocalTerminal where the job has one

    def can_rewind(self):
        return all(source.can_rewind() for source in self.sources.values())

    def begin(self, attempt):
        """An attempt starts: inputs from their beginning."""
        for source in self.sources.values():
            source.rewind()
        self.attempt = attempt
        self.channel = attempt.channel

    def accepted(self):
        """A worker has started the job."""

    def moved(self):
        """The worker that had it is lost; another one is looked for."""

    def visible(self):
        """Something of the job has been seen here: it never starts again."""

    def copied(self):
        """The inputs of which only a copy is sent until the job has read all of it."""
        return frozenset()

    def input_emptied(self, number):
        """The job has read all that was sent of a copied input."""

    def input_stopped(self, number, consumed):
        """The job reads it no more, after so many bytes; UNKNOWN if that cannot be told."""

    def others_wait(self, waiting):
        """Whether others wait for this job's slot: a job that can give it back does."""

    def ended(self, report):
        """The job has; report is its ExitReport, or None when the cluster failed."""

    def read_error(self, number, error):
        """A source cannot be read: 0 to end it, None to leave it for now."""
        return 0

    # -- what sources and sinks say
    def source_ready(self, number):
        if self.channel:
            self.channel.source_ready(number)

    def consumed(self, number, size):
        if self.channel:
            self.channel.consumed(number, size)

    def sink_finished(self, number):
        """All of an output has been delivered, or nobody takes more of it."""
        self.delivered.add(number)
        if self.attempt:
            self.attempt.output_over(number)


class TemporaryFile:
    """Makes the file of a Spool: one without a name, in TMPDIR or /tmp."""
    waits = True                        # space may come free: what the file does not take stays in memory meanwhile

    def folder(self):
        return os.environ.get("TMPDIR") or "/tmp"

    def open(self):
        """A descriptor."""
        path = os.path.join(self.folder(), "cexec-" + os.urandom(8).hex())
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        os.unlink(path)
        return fd

    def place(self):
        """In the words of an error."""
        return "the temporary folder %s" % printable(os.fsencode(self.folder()))

    def close(self, fd):
        os.close(fd)


class Budget:
    """What several Spools hold together, and which of the jobs that fill them may go on.

    From `limit` bytes on, and while the temporary folder takes no more, a job's HeldStreams give no credit, until
    pay() finds that there is room again; only the first in order, by their `turn`, goes on whatever is held, or all
    would wait for ever.  may_favour() says whether it is known which one that is."""

    def __init__(self, limit=math.inf, may_favour=lambda: True):
        self.limit = limit
        self.may_favour = may_favour
        self.held = 0
        self.memory = 0                 # of that, in memory
        self.full = ""                  # why the temporary folder took no more, in words
        self.live = set()               # HeldStreams whose job has begun
        self.waiting = set()            # those of them that owe credit
        self.postponed = []             # those that gave up what they had written for the first in order

    def has_room(self):
        return self.held < self.limit and not self.waiting and self.memory < 2 * Spool.MEMORY_ALL

    def running(self):
        """The HeldStreams whose job has a worker, in their order."""
        return sorted((streams for streams in self.live if streams.attempt), key=lambda streams: streams.turn)

    def leave(self, streams):
        """Its job writes no more."""
        self.live.discard(streams)
        self.waiting.discard(streams)
        if streams in self.postponed:
            self.postponed.remove(streams)

    def pay(self):
        """Something has become less, or somebody waits: whoever may go on does."""
        if not self.waiting and not self.postponed:
            return
        running = self.running()
        if self.waiting and running and self.may_favour():
            running[0].first = True
        for streams in running:
            if streams in self.waiting:
                streams.pay()
        if self.postponed and not self.waiting:
            postponed, self.postponed = self.postponed, []
            for streams in postponed:
                streams.resume()

    def make_room(self, wanting):
        """The first in order fills all the memory that it may have, and its file takes no more: the last one gives up
        what it has written and starts again later.  Returns whether there is one."""
        last = self.running()[-1]
        if last is wanting:
            return False
        last.postpone()
        self.postponed.append(last)
        return True


class Spool:
    """Bytes that are held here: the first of them in a file, once they are many, and the rest in memory.  The file
    comes from `files`, a TemporaryFile.  What that does not take stays in memory too, and `trouble`, an OSError, says
    why, until write_out() finds it well again.  Whoever makes it clears it.  LocalFailure when a file that will not
    get better cannot be written."""
    __slots__ = ("budget", "files", "memory", "fd", "filed", "trouble")
    MEMORY_EACH = 1 << 18       # bytes of one that stay in memory
    MEMORY_ALL = 1 << 24        # bytes of all of a Budget in memory, from which on each has only a sixteenth of that

    def __init__(self, budget, files=None):
        self.budget = budget
        self.files = files or NAMELESS
        self.memory = bytearray()
        self.fd = None
        self.filed = 0          # bytes in the file
        self.trouble = None

    size = property(lambda self: self.filed + len(self.memory))

    def append(self, data):
        size, budget = len(data), self.budget
        self.memory += data
        budget.memory += size
        budget.held += size
        if not self.trouble and (self.fd is not None or len(self.memory) > (
                self.MEMORY_EACH if budget.memory < self.MEMORY_ALL else self.MEMORY_EACH >> 4)):
            self.write_out()

    def write_out(self):
        """Puts into the file what is in memory.  Returns whether it took all of it."""
        done = 0
        try:
            if self.fd is None:
                self.fd = self.files.open()
            with memoryview(self.memory) as view:
                while done < len(view):
                    done += os.pwrite(self.fd, view[done:], self.filed + done)
            self.trouble = None
        except OSError as error:
            if not self.files.waits:
                raise LocalFailure(self.files.place(), reason_of(error)) from None
            self.trouble = error
        finally:
            del self.memory[:done]
            self.filed += done
            self.budget.memory -= done
        return not self.trouble

    def read_at(self, position, view):
        """Reads some bytes from there; 0 behind the last one."""
        if position < self.filed:
            view = view[:self.filed - position]
            size = read_into(self.fd, view, position)
            if not size and len(view):
                raise LocalFailure(self.files.place(), "a file there has become shorter")
            return size
        part = self.memory[position - self.filed:position - self.filed + len(view)]
        view[:len(part)] = part
        return len(part)

    def pieces(self, start=0):
        """What it holds from there on, a buffer at a time; the next one replaces the one before."""
        buffer = memoryview(bytearray(min(BUFFER, max(1, self.size - start))))
        while start < self.size:
            size = self.read_at(start, buffer)
            start += size
            yield buffer[:size]

    def cut(self, size):
        """Keeps so many bytes, and returns a Spool with what was behind them."""
        rest = type(self)(self.budget, self.files)
        for piece in self.pieces(size):
            rest.append(piece)
        self.budget.held -= self.size - size
        in_memory = max(0, size - self.filed)
        self.budget.memory -= len(self.memory) - in_memory
        self.filed = min(self.filed, size)
        del self.memory[in_memory:]
        return rest

    def clear(self):
        """Holds nothing any more; may be used again.  Its file, if there is one, is closed."""
        self.budget.held -= self.size
        self.budget.memory -= len(self.memory)
        self.memory = bytearray()
        self.filed = 0
        self.trouble = None
        if self.fd is not None:
            fd, self.fd = self.fd, None
            self.files.close(fd)

    def __bytes__(self):
        return bytes(self.memory) if not self.filed else b"".join(map(bytes, self.pieces()))

    def __len__(self):
        return self.size


NAMELESS = TemporaryFile()


class HeldInput(Input):
    """What one attempt at a job reads: it can start again and never has to wait.

    It is bytes, a Spool that is complete, the path (str) of a regular file, or a descriptor of one, of which `start`
    and `length` may name a part, whatever its own offset is.  Each run of a job makes one of its own, for it has a
    position; bytes, Spool and descriptor belong to whoever opened them, but for a descriptor that is `given`.
    `head` (bytes) stands before all that.  `digest`, of hashlib, is what comes before the input's bytes in the hash
    of all that was read.  Failure or OSError when the path cannot be opened.
    """

    def __init__(self, input=b"", start=0, length=None, given=False, head=b"", digest=None):
        self.spool = input if isinstance(input, Spool) else None
        self.fd = open_regular(input) if isinstance(input, str) else input if isinstance(input, int) else None
        self.given = given or isinstance(input, str)
        self.data = head + input if self.spool is None and self.fd is None else head
        self.start = start
        self.length = length
        self.position = 0
        self.digest = digest
        self.hash = digest and digest.copy()
        self.status = None if self.fd is None else os.fstat(self.fd)

    def read_into(self, view):
        behind = self.position - len(self.data)
        if behind < 0:
            part = memoryview(self.data)[self.position:self.position + len(view)]
            size = len(part)
            view[:size] = part
        elif self.spool is not None:
            size = self.spool.read_at(behind, view)
        elif self.fd is not None:
            if self.length is not None:
                view = view[:self.length - behind]
            size = read_into(self.fd, view, self.start + behind)
        else:
            size = 0
        self.position += size
        if self.hash:
            self.hash.update(view[:size])
        return size

    def has_changed(self):
        """Whether the file is not any more what it was when this began to read it."""
        if self.fd is None:
            return False
        now, then = os.fstat(self.fd), self.status
        if now.st_nlink != then.st_nlink:       # its names have changed, which says nothing of its bytes
            return (now.st_size, now.st_mtime_ns) != (then.st_size, then.st_mtime_ns)
        return (now.st_size, now.st_mtime_ns, now.st_ctime_ns) != (then.st_size, then.st_mtime_ns, then.st_ctime_ns)

    def rewind(self):
        self.position = 0
        self.hash = self.digest and self.digest.copy()
        self.status = None if self.fd is None else os.fstat(self.fd)

    def end(self):
        """Closes what it has opened or was given.  May be called again."""
        if self.given and self.fd is not None:
            fd, self.fd = self.fd, None
            os.close(fd)


class HeldOutput(Output):
    """Keeps an output in its Spool."""

    def __init__(self, streams, number, spool):
        self.streams = streams
        self.number = number
        self.spool = spool

    def feed(self, view):
        try:
            self.spool.append(view)
        except LocalFailure as failure:
            self.streams.broken(failure)
        else:
            self.streams.kept(self.number, len(view))
        return False

    def finish(self):
        self.streams.sink_finished(self.number)


class HeldStreams(JobStreams):
    """Standard input, output and error of a job, held here: so it may start again at any moment.

    The source, a HeldInput, is ended by whoever made it.  After the job `output` and `errors` hold what it wrote,
    until close().  turn: which of several goes on when all together hold too much: the least.  output_file, a
    TemporaryFile with a budget of its own, is for an output that gets a file to stay.
    """
    held = True

    def __init__(self, source, budget=None, turn=0, output_file=None):
        super().__init__()
        self.budget = budget or Budget()
        self.turn = turn
        self.first = False              # its job may write whatever the budget says
        self.owed = {}                  # {output: bytes kept for which no credit was given back}
        self.resume = None              # what starts it again after postpone()
        self.output = Spool(output_file.budget if output_file else self.budget, output_file)
        self.errors = Spool(self.budget)
        self.descriptors = {0: IN, 1: OUT, 2: OUT}
        self.sources = {0: source}
        self.sinks = {1: HeldOutput(self, 1, self.output), 2: HeldOutput(self, 2, self.errors)}

    def begin(self, attempt):
        """What another attempt wrote is thrown away."""
        self.delivered.clear()
        self.close()
        super().begin(attempt)
        self.budget.live.add(self)

    def ended(self, report):
        self._leave()

    def _leave(self):
        """The job writes no more."""
        self.owed = {}
        self.first = False
        self.budget.leave(self)

    def kept(self, number, size):
        """An output has grown; if too much is held already, the job hears of that later."""
        if number == 1 and self.output.budget is not self.budget:
            return self.consumed(number, size)
        self.owed[number] = self.owed.get(number, 0) + size
        self.budget.waiting.add(self)
        self.pay()
        if self in self.budget.waiting:
            self.budget.pay()

    def pay(self):
        """If there is room again the job may write on."""
        spools = [spool for spool in (self.output, self.errors) if spool.trouble and not spool.write_out()]
        for spool in spools:
            self.budget.full = "%s: %s" % (spool.files.place(), reason_of(spool.trouble))
        if self.first and sum(len(spool.memory) for spool in spools) >= Spool.MEMORY_ALL:
            if not self.budget.make_room(self):
                self.broken(JobFailure("what it wrote, %d bytes so far" % (self.output.size + self.errors.size),
                                       "no room in " + self.budget.full, "TMPDIR names another folder"))
        elif self.first or not spools and self.budget.held < self.budget.limit:
            self.budget.waiting.discard(self)
            owed, self.owed = self.owed, {}
            for number, size in owed.items():
                self.consumed(number, size)

    def postpone(self):
        """Gives up what the job has written; resume() starts it again."""
        pool, submission = self.attempt.pool, self.attempt.submission
        pool.withdraw(submission)
        self.close()
        self.resume = functools.partial(pool.submit, submission)

    def read_error(self, number, error):
        self.broken(JobFailure("the input", reason_of(error)))
        return 0

    def broken(self, failure):
        """Something that belongs to the job cannot be read or written here."""
        if self.attempt:
            self.attempt.pool.fail(self.attempt.submission, failure)

    def close(self):
        """Throws away the outputs.  May be called again."""
        self._leave()
        for spool in self.output, self.errors:
            if spool.size or spool.fd is not None:
                spool.clear()


def open_regular(path):
    """A descriptor for reading a regular file; Failure for anything else, OSError when it cannot be opened."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)      # a FIFO would wait for its writer
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        what, kind = printable(os.fsencode(path)), "a folder" if stat.S_ISDIR(mode) else "not a regular file"
        raise JobFailure(what, kind, "" if kind == "a folder" else
                         "what cannot be read twice would be lost with a worker: copy it to a file", EXIT_USAGE)
    return fd


# ---------------------------------------------------------------- pool
#
# A Pool finds workers for jobs and runs them.  It knows no signals, no standard descriptors and no exit(): cexec is
# one with one job, cmap and the Python API give it many.

AHEAD = 4                   # jobs that wait for a slot: one that comes free has its next job at once
RECENTLY = 15.0             # seconds for which what a worker said last counts
SPARE = 0.02                # seconds for which a search goes on that nobody needs at the moment
WATCH_EVERY = 0.25          # seconds between two looks at those that wait
KEEP = 0.9                  # seconds that a connection without a job is kept; the worker ends it after one
START_PATIENCE = 1.0        # seconds from the offer to the job's start; doubled with each lost worker
OFFER_TIME = 2.0            # seconds that are enough for every worker that is there to offer itself
SIGNAL_GRACE = 10.0         # seconds that a job has after INT or TERM
TERMINAL_MAX = 2048         # bytes kept free in the job message for a terminal's description
ALERT_GAP = 0.025           # seconds between two alert datagrams: more of them travel together
NOBODY = 60.0               # seconds without a word from any worker after which there is none


class NoWorker(Failure):
    """No worker was found for a job."""


class JobRefused(Failure):
    """Every worker that offered itself has refused the job for good: to ask them again would be in vain."""


class Submission:
    """One job as its user wants it.

    retries: how often it starts again when its worker was lost.
    timeout: seconds from its start on a worker after which it is ended, with status 124; None for no such limit.
    on_done(status, failure, submission) is called once: the job's status, or None and a Failure.
    on_event(text, always) hears what happens to it on the way; always: the user is to know in any case.
    accepts(instance, address), which the owner may set: whether it is to run on this worker now.
    """

    def __init__(self, streams, names, retries, on_done, on_event=None, timeout=None):
        self.id = os.urandom(8).hex()
        self.streams = streams
        self.names = names
        self.retries = retries
        self.timeout = timeout
        self.on_done = on_done
        self.on_event = on_event or (lambda text, always=False: None)
        self.accepts = lambda instance, address: True
        self.state = JobState.WAITING
        self.attempt = None             # while a worker has it, and until it is delivered
        self.avoidance = Avoidance()
        self.lost = 0                   # workers lost
        self.excused = False            # a worker wanted its slot back just when the job was offered to it
        self.refused_since = None       # when the first worker refused it for good, monotonic seconds
        self.committed = False          # something of it has become visible here
        self.signalled = None           # "INT" or "TERM", once sent
        self.waiting_signals = []       # to be sent as soon as the job runs
        self.waiting_since = None       # monotonic seconds, from its first time in the queue until it has started
        self.last_loss = ""             # words
        self.worker = None              # name of the last one
        self.instance = None            # and which run of cservice it is
        self.report = None              # the ExitReport
        if any(b"\0" in part for pair in names for part in pair):
            raise Failure("NAME=VALUE", "a NUL byte, which no environment can hold", "", EXIT_USAGE)
        size = len(encode_job(Job(self.id, streams.descriptors, names, 1, None)))
        if size > CONTROL_MAX - TERMINAL_MAX:
            raise Failure("NAME=VALUE", "%d bytes in all, at most %d go along" % (size, CONTROL_MAX - TERMINAL_MAX),
                          "send what is long through a descriptor", EXIT_USAGE)

    def move(self, event):
        self.state = next_state(JOBS, self.state, event, "job " + self.id)

    def refused_for_good(self):
        """Its last worker will never run it.  Others may."""
        self.refused_since = self.refused_since or time.monotonic()

    def wants(self, now, instance, address, in_use):
        """Whether it may be offered to this worker now."""
        return self.accepts(instance, address) and not self.avoidance.passes_over(now, instance, address, in_use)


class Attempt:
    """One job on one worker's connection: the channel's owner while the job is there.

    A PooledConnection makes it.  It moves the job's state, and tells the Pool when the worker has done with it: by
    on_exit and on_delivered, or by one of on_refused, on_not_started, on_lost and on_timeout.
    """

    def __init__(self, pool, kept, submission):
        self.pool = pool
        self.loop = pool.loop
        self.kept = kept
        self.submission = submission
        self.streams = submission.streams
        self.channel = kept.channel
        self.session = kept.channel.session
        self.offered = time.monotonic()
        self.exited_at = None           # monotonic seconds, when the worker has told of the job's end
        self.start_timer = NO_TIMER
        self.limit_timer = NO_TIMER

    def start(self):
        """Offers the job."""
        streams, submission, settings = self.streams, self.submission, self.pool.settings
        streams.begin(self)
        terminal = streams.terminal.describe() if streams.terminal else None
        job = Job(submission.id, streams.descriptors, submission.names, settings.timeout_pingpong, terminal,
                  streams.copied() if self.kept.sees_reading else frozenset(),
                  user_here() if settings.user is None else settings.user)
        self.channel.owner = self
        self.session.offer(job, self.kept.submitter)
        for number in streams.delivered:
            self.session.stop(number)       # its reader went while another worker had the job
        patience = START_PATIENCE * 2 ** submission.lost if submission.retries else settings.timeout_pingpong
        self.start_timer = self.loop.call_later(patience, lambda: self._lost("did not start the job"))
        for number, source in streams.sources.items():
            if streams.descriptors[number] != TTY:
                self.channel.add_source(number, source)
        self.channel.flush()

    # -- the channel's owner
    def on_message(self, kind, number, body):
        if kind == ACCEPTED:
            self._accepted()
        elif kind == END:
            self._commit()
            self.streams.sinks[number].finish()
        elif kind == STOP:
            self._commit()
            self.channel.drop_source(number)
            self.streams.input_stopped(number, body)
        elif kind == EMPTIED:
            self.streams.input_emptied(number)
        elif kind == OTHERS_WAIT:
            self.streams.others_wait(body)
        elif kind == EXIT:
            self._exited(body)
        elif kind == REFUSED:
            self.pool.on_refused(self, body, final=bool(number))
        elif kind == ABORT and self.submission.state is JobState.OFFERED:
            self.pool.on_not_started(self, body)
        elif kind == ABORT:
            self._lost("gave the job up: %s" % body)

    def on_data(self, number, view):
        self._commit()
        return self.streams.sinks[number].feed(view)

    def on_source_end(self, number):
        """The worker hears of it from the channel."""

    def on_read_error(self, number, error):
        return self.streams.read_error(number, error)

    def on_lost(self, loss):
        self._lost(loss.words)

    # -- on its way
    def _accepted(self):
        submission = self.submission
        submission.move(JobEvent.ACCEPTED)
        self.start_timer.cancel()
        submission.waiting_since = None
        submission.on_event("job %s started on %s" % (submission.id, self.kept.name))
        for name in submission.waiting_signals:
            self.session.signal(name)
        submission.waiting_signals = []
        if submission.timeout is not None:
            self.limit_timer = self.loop.call_later(submission.timeout, lambda: self.pool.on_timeout(self))
        self.streams.accepted()
        terminal = self.streams.terminal
        if terminal and terminal.number in self.streams.sources:
            self.channel.add_source(terminal.number, self.streams.sources[terminal.number])
            self.channel.flush()

    def _commit(self):
        if not self.submission.committed and not self.streams.held:
            self.submission.committed = True
            self.streams.visible()

    def is_running(self):
        """Whether a worker has the job."""
        return self.submission.state in AT_WORKER

    def signal(self, name):
        self.session.signal(name)
        self.channel.flush()

    def resize(self, rows, columns):
        if self.is_running():
            self.session.window(rows, columns)
            self.channel.flush()

    def output_over(self, number):
        """This output has been delivered, or nobody reads it any more."""
        if self.is_running():
            self.session.stop(number)
            if self.session.outbox:
                self.channel.flush()
        else:
            self._maybe_delivered()

    def _exited(self, report):
        self.submission.move(JobEvent.EXIT)
        self.submission.report = report
        self.exited_at = time.monotonic()
        self.limit_timer.cancel()
        self._commit()
        self.streams.channel = None
        self.channel.reset_streams()
        self.channel.owner = self.kept      # what becomes of the connection changes nothing for this job any more
        self.pool.on_exit(self, report)
        self._maybe_delivered()

    def _maybe_delivered(self):
        if self.submission.state is JobState.DELIVERING and len(self.streams.delivered) == len(self.streams.sinks):
            self.pool.on_delivered(self)

    def _lost(self, reason):
        self.channel.close()
        self.pool.on_lost(self, reason)

    def leave(self):
        """Lets go of the job, whose state has been moved.  A worker that still has it ends it when the connection goes;
        one that has reported its end may have another."""
        self.submission.attempt = self.streams.attempt = self.streams.channel = None
        self.start_timer.cancel()
        self.limit_timer.cancel()
        if self.channel.owner is self:
            self.kept.close()


class PooledConnection:
    """A worker's proven connection, on which jobs run one after another; the channel's owner between them.  The Pool
    makes it, and it is gone when its channel is closed."""

    def __init__(self, pool, found):
        self.pool = pool
        self.name = found.name
        self.address = found.address
        self.instance = found.instance
        self.submitter = found.submitter
        self.sees_reading = found.sees_reading
        self.jobs = 0                   # that were offered to it
        self.timer = NO_TIMER
        self.channel = Channel(pool.loop, found.take(), found.session, self)
        self.channel.on_ended = self.close

    def run(self, submission):
        """Offers it the job."""
        self.timer.cancel()
        self.jobs += 1
        submission.attempt = Attempt(self.pool, self, submission)
        submission.worker, submission.instance = self.name, self.instance
        submission.attempt.start()

    def rest(self):
        """There is no job for it at the moment."""
        self.timer = self.pool.loop.call_later(KEEP, self.leave)

    def leave(self):
        """Says goodbye, and closes when that is sent."""
        if not self.channel.closed:
            self.channel.session.bye()
            self.channel.on_flushed = self.close
            self.channel.flush()

    def close(self):
        self.timer.cancel()
        self.channel.close()
        self.pool.on_connection_gone(self)

    def on_message(self, kind, number, body):
        self.close()            # an abort: the worker takes no more jobs here

    def on_lost(self, loss):
        self.close()


class AlertSender:
    """Sends alerts, a lone one at once and many together, each datagram twice, so that one may be lost.

    socket: the GroupSocket to send by.  No alert can cost a job's result."""

    def __init__(self, loop, key, socket):
        self.loop = loop
        self.key = key
        self.socket = socket
        self.nonce = os.urandom(8)
        self.sequence = 0
        self.entries = []
        self.again = []                 # datagrams to be sent once more
        self.sent_at = -math.inf
        self.timer = None

    def add(self, alert):
        self.entries.append(encode_alert(alert))
        if not self.timer:
            wait = max(0.0, self.sent_at + ALERT_GAP - time.monotonic())
            if wait:
                self.timer = self.loop.call_later(wait, self._send)
            else:
                self._send()

    def _send(self):
        """What is new, and what was sent the last time once more."""
        if self.timer:
            self.timer.cancel()
        again, self.again = self.again, []
        for body in pack_alerts(self.entries) if self.entries else ():
            self.sequence += 1
            self.again.append(encode_datagram(self.key.udp, ALERT, self.key.id, self.nonce, self.sequence, body))
        for datagram in self.again + again:
            self.socket.send(datagram)
        self.entries = []
        self.sent_at = time.monotonic()
        self.timer = self.loop.call_later(ALERT_GAP, self._send) if self.again else None

    def close(self):
        """Sends what is left.  May be called again."""
        while self.entries or self.again:
            self._send()


class Pool:
    """All the workers of one key, as one submitter uses them: a queue of jobs, connections, and one search at a time.

    on_ready, if given, is called whenever has_capacity() may have become true: a slot came free or was found.
    more, which the owner sets, is how many further jobs it could submit at once beyond those in the queue.
    trace(text), if given, hears of each step.
    """

    def __init__(self, loop, key, settings, most=1, keep=False, on_ready=None, trace=None):
        self.loop = loop
        self.key = key
        self.settings = settings
        self.most = most                # connections at once
        self.keep = keep                # whether connections wait for more jobs
        self.on_ready = on_ready
        self.more = 0
        self.trace = trace or (lambda text: None)
        self.id = os.urandom(8)
        self.queue = collections.deque()    # submissions that wait for a worker
        self.backing_off = set()        # those that have failed often and wait before they are in the queue again
        self.running = set()            # those with an attempt
        self.failing = set()            # those that avoid a worker
        self.connections = set()
        self.idle = []                  # of these, those without a job
        self.port = None                # the AnswerPort, once it is needed
        self.no_port = None             # why there can be none at the moment, a PortTaken
        self.search = None              # the last one
        self.alerts = None
        self.searching_since = math.inf     # when it began to look for workers, and had none, monotonic seconds
        self.heard_at = time.monotonic()    # when any worker was heard of last
        self.proven_at = self.heard_at      # when one has shown last that it has the private key
        self.served_at = -math.inf      # when a room with kept connections had one last
        self.heard = Recent(INSTANCES_MAX)  # {instance, else name: HeardWorker}
        self.offered = Recent(INSTANCES_MAX)    # {instance: when it offered itself last}
        self.watch_timer = None
        self.spare_timer = None
        self.tls = None                 # the TLS context, once it is needed
        self.closed = False

    # -- for the owner
    def has_capacity(self, held_back=0):
        """Whether one more job would soon get a slot: then is the time to make it.  held_back: how many of those in the
        queue wait for a worker that is not there."""
        return not self.closed and (bool(self.idle) or len(self.queue) - held_back < AHEAD)

    def working(self):
        """The instances of the workers that run a job now."""
        return {submission.instance for submission in self.running}

    def serving(self):
        """The instances of the workers that run a job or may have one, on a connection that there is."""
        return {kept.instance for kept in self.connections if kept.channel.session.phase is not OVER}

    def submit(self, submission, first=False):
        """first: in front of the others that wait."""
        if not (self.queue or self.running or self.backing_off or self.connections):
            self.searching_since = self.proven_at = time.monotonic()
        (self.queue.appendleft if first else self.queue.append)(submission)
        if submission.waiting_since is None:
            submission.waiting_since = time.monotonic()
        self._pump()

    def signal(self, submission, name):
        """A signal for a job.  Returns whether the job will hear of it; otherwise it is done with."""
        ends = name in ("INT", "TERM")
        if submission.state is JobState.DONE:
            return False
        if submission.state not in AT_WORKER or (ends and submission.signalled):
            if name in ("USR1", "USR2"):
                submission.waiting_signals.append(name)
                return True
            return name in ("TSTP", "CONT")
        if ends:
            submission.signalled = name
        submission.attempt.signal(name)
        return True

    def withdraw(self, submission):
        """Takes a job back, which ends on its worker; it may be submitted again."""
        if submission.state in AT_WORKER:
            self._move(submission, JobEvent.WITHDRAWN)
            self._ready()

    def cancel(self, submission):
        """Forgets a job, whatever it is at; nothing is called for it any more.  A running one ends on its worker."""
        if submission.state is not JobState.DONE:
            self._move(submission, JobEvent.CANCELLED)
            self._ready()

    def fail(self, submission, failure):
        """Something here broke for this job, as an output that cannot be written."""
        if submission.state is not JobState.DONE:
            self._finish(submission, JobEvent.FAILED, None, failure)

    def close(self):
        """Ends all connections, and with them all jobs.  Nothing is called any more."""
        self.closed = True
        for submission in [*self.running, *self.queue, *self.backing_off]:
            self._move(submission, JobEvent.CANCELLED)
        for kept in list(self.connections):
            kept.close()
        self._close_port()
        for timer in self.watch_timer, self.spare_timer:
            if timer:
                timer.cancel()

    def context(self):
        self.tls = self.tls or tls_context(self.key, server_side=True)
        return self.tls

    # -- workers for those that wait
    def _ready(self):
        if self.on_ready and self.has_capacity():
            self.on_ready()
        self._pump()

    def _pump(self):
        """Gives jobs to idle connections, and looks for more workers where that is not enough."""
        if self.closed:
            return
        while self.queue and self.idle:
            kept = self.idle.pop()
            submission = self._next_for(kept.instance, kept.address)
            if submission:
                self._run(kept, submission)
            else:
                kept.leave()
        searching = self.search and not self.search.is_over()
        if not self.wanted():
            if searching and not self.spare_timer:      # the next job may come in a moment
                self.spare_timer = self.loop.call_later(SPARE, self._stop_spare)
        elif searching:
            self.search.look()
        else:
            self._begin_search()
        if self.queue and not self.watch_timer:
            self.watch_timer = self.loop.call_later(WATCH_EVERY, self._watch)

    def wanted(self):
        """How many more slots can be used now."""
        return max(0, min(len(self.queue) + self.more, self.most - len(self.connections))) if self.queue else 0

    def _next_for(self, instance, address):
        """The first job in the queue that may run on this worker now, or None."""
        now = time.monotonic()
        in_use = {submission.attempt.kept.address for submission in self.running} if self.failing else ()
        return next((each for each in self.queue if each.wants(now, instance, address, in_use)), None)

    def avoids(self, instance, address):
        """Whether none of the jobs that wait wants this worker, which has offered itself."""
        self.offered[instance] = time.monotonic()
        return bool(self.queue) and self._next_for(instance, address) is None

    def _begin_search(self):
        try:
            if not self.port:
                self.port = AnswerPort(self.loop, self.settings)
                self.alerts = AlertSender(self.loop, self.key, self.port.socket)
        except PortTaken as failure:
            return self._wait_for_port(failure)
        self.no_port = None
        self.search = Discovery(self, self.port)

    def _wait_for_port(self, failure):
        """A later look finds a number free.  As with a room that is busy, nobody has failed."""
        self.heard_at = self.proven_at = time.monotonic()
        if not (self.no_port or self.connections):
            self.queue[0].on_event("%s; waits for one" % failure, True)
        self.no_port = failure

    def _close_port(self):
        if self.port:
            self.search.stop()
            self.alerts.close()
            self.port.close()
            self.port = None

    def _close_unused_port(self):
        if not (self.connections or self.queue or self.backing_off):
            self._close_port()

    def _stop_spare(self):
        self.spare_timer = None
        if not self.wanted() and self.search:
            self.search.stop()

    def _run(self, kept, submission):
        self.queue.remove(submission)
        submission.move(JobEvent.FOUND)
        self.running.add(submission)
        kept.run(submission)
        if getattr(self.settings, "ratout_test", False):        # which cmap does not have
            self._alert(submission.attempt, RATTED_OUT, 0, "test")

    def _watch(self):
        """Who waits for too long fails."""
        self.watch_timer = None
        now, limit = time.monotonic(), self.settings.timeout_accept
        if self.keep and self.connections:      # the room serves us as well as it can
            self.served_at = now
        for submission in [*self.queue, *self.backing_off]:
            since = max(submission.waiting_since, self.served_at)
            if submission.refused_since is not None and self._all_have_refused(submission, now):
                self.fail(submission, JobRefused("the job was refused by %s" % submission.worker,
                                                 list(submission.avoidance.refused.values())[-1], status=EXIT_USAGE))
            elif limit and now - since > limit or limit is None and now - max(since, self._alive_at()) > NOBODY:
                unproven = self.heard_at > self._alive_at()
                seconds = limit or (now - max(since, self.proven_at) if unproven else NOBODY)
                self.fail(submission, NoWorker("no worker", *self._diagnosis(submission, submission.waiting_since)
                                               .failure(seconds, unproven)))
        self._pump()

    def _all_have_refused(self, submission, now):
        """Whether every worker that there is, in a while that is enough for one to offer itself, will never take it."""
        refused, tried = submission.avoidance.refused, submission.avoidance.until
        if now - self.searching_since < OFFER_TIME:
            return False
        recent = {instance for instance, at in self.offered.items() if now - at < OFFER_TIME}
        return not (recent | self.serving() | set(tried)) - set(refused)

    # -- what the search says
    def _alive_at(self):
        """When the room was alive last.  Whoever can submit can say that workers are busy, so that counts for as long
        as one of them shows now and then that it has the private key."""
        return min(self.heard_at, self.proven_at + NOBODY)

    def doubts(self):
        """Whether it is time for that."""
        return time.monotonic() - self.proven_at > NOBODY / 2

    def on_proven(self):
        self.proven_at = time.monotonic()

    def on_found(self, found):
        """A worker has proven itself and waits for a job."""
        self.heard_at = time.monotonic()
        kept = PooledConnection(self, found)
        self.connections.add(kept)
        self._has_idle(kept)

    def on_heard(self, name, address, reason, here):
        """A worker was heard of: it has connected, is busy, cannot connect, has failed its handshake.  A room in which
        nobody can ever be reached is not alive."""
        now = time.monotonic()
        if here and here.state != UNREACHABLE:
            self.heard_at = now
        self.heard.pop(name, None)
        self.heard[here.instance if here else name] = HeardWorker(now, name, here, reason)
        if here:
            self.trace("%s %s" % (name, "is " + reason if here.state != UNREACHABLE else reason))

    # -- what connections say
    def _has_idle(self, kept):
        """The connection may have another job, at once or soon."""
        self.idle.append(kept)
        self._ready()
        if kept in self.idle:
            kept.rest()

    def on_connection_gone(self, kept):
        self.connections.discard(kept)
        if kept in self.idle:
            self.idle.remove(kept)
        if not (self.connections or self.closed):
            self.loop.call_later(KEEP, self._close_unused_port)
        self._ready()

    def on_exit(self, attempt, report):
        """A job has ended, though its output may not have been delivered yet."""
        for submission in self.failing:
            submission.avoidance.succeeded(attempt.kept.address)
        if report.last or not self.keep:
            attempt.kept.leave()
        else:
            self._has_idle(attempt.kept)

    def on_delivered(self, attempt):
        submission = attempt.submission
        if submission.report.reason:
            submission.on_event("job %s on %s was ended by %s" % (submission.id, submission.worker,
                                                                  submission.report.reason), True)
        self._finish(submission, JobEvent.DELIVERED, submission.report.status, None)

    def on_timeout(self, attempt):
        """It has run for as long as it may: it ends on its worker, with the connection."""
        submission = attempt.submission
        submission.on_event("job %s on %s was ended by its timeout of %g s" % (
            submission.id, submission.worker, submission.timeout), True)
        self._finish(submission, JobEvent.TIMED_OUT, EXIT_TIMEOUT, None)

    def on_not_started(self, attempt, reason):
        """The worker wanted its slot back just when the job was offered: on a connection that has served before that
        is nobody's fault, once."""
        submission = attempt.submission
        self._move(submission, JobEvent.NOT_STARTED)
        if attempt.kept.jobs == 1 or submission.excused:
            self._has_failed(attempt, "%s did not start the job: %s" % (attempt.kept.name, reason))
        submission.excused = True
        self._again(submission)

    def on_refused(self, attempt, reason, final):
        """The job has not started: looking again, as long as there is time, costs nothing."""
        submission, text = attempt.submission, "%s refused the job: %s" % (attempt.kept.name, reason)
        self._move(submission, JobEvent.REFUSED)
        submission.on_event(text, not (final or submission.last_loss))
        if final:
            submission.refused_for_good()
        self._has_failed(attempt, text, reason if final else None)
        self._again(submission)

    def on_lost(self, attempt, reason):
        submission, kept = attempt.submission, attempt.kept
        submission.lost += 1
        advice = why_not_again(submission.committed, submission.lost, submission.retries, submission.signalled,
                               submission.streams.can_rewind())
        self._move(submission, JobEvent.FAILED if advice else JobEvent.LOST)
        self._alert(attempt, RATTED_OUT, 0, reason)
        if not self.connections:
            self.searching_since = time.monotonic()
        if advice:
            return self._tell(submission, None, Failure("worker %s" % kept.name, reason, advice))
        submission.streams.moved()
        self._has_failed(attempt, "worker %s: %s after %.1f s; the job may have run there in part" % (
            kept.name, reason, time.monotonic() - attempt.offered))
        submission.on_event(submission.last_loss + "; it starts again elsewhere", True)
        self._again(submission)

    def _has_failed(self, attempt, text, final=None):
        """Its worker has failed a job: another one first; when nobody else has come by then it may try again."""
        submission = attempt.submission
        submission.last_loss = text
        self.failing.add(submission)
        pause = submission.avoidance.failed(time.monotonic(), attempt.kept.instance, attempt.kept.address, final)
        if final is None:
            self.loop.call_later(pause, self.announce_again)

    def announce_again(self):
        """A worker may be wanted from now on that was not until now."""
        if self.search and not self.search.is_over():
            self.search.again()

    def _again(self, submission):
        """Back into the queue, at once or when it has waited."""
        if submission.signalled:
            self._move(submission, JobEvent.CANCELLED)
            return self._tell(submission, 128 + SIGNAL_NAMES[submission.signalled], None)
        pause = submission.avoidance.wait_until - time.monotonic()
        if pause <= 0:
            return self.submit(submission, first=True)
        if submission.waiting_since is None:
            submission.waiting_since = time.monotonic()
        self.backing_off.add(submission)
        self.loop.call_later(pause, lambda: self._back(submission))
        self._ready()

    def _back(self, submission):
        if submission in self.backing_off:
            self.backing_off.discard(submission)
            self.submit(submission, first=True)

    # -- the end
    def _move(self, submission, event):
        """Records what has happened to a job that its worker or the queue has no longer, and lets go of it there."""
        waiting, attempt = submission.state is JobState.WAITING, submission.attempt
        submission.move(event)
        if attempt:
            attempt.leave()
        self.running.discard(submission)
        self.backing_off.discard(submission)
        if waiting and submission in self.queue:
            self.queue.remove(submission)
        if submission.state is JobState.DONE:
            self.failing.discard(submission)
            submission.streams.ended(submission.report)

    def _finish(self, submission, event, status, failure):
        attempt = submission.attempt
        self._move(submission, event)
        if event in (JobEvent.DELIVERED, JobEvent.TIMED_OUT):
            self._alert(attempt, COMPLETED, status & 255, "")
        self._tell(submission, status, failure)

    def _tell(self, submission, status, failure):
        """The only way to a job's end that its owner hears of."""
        submission.on_done(status, failure, submission)
        self._ready()

    def _alert(self, attempt, verdict, status, reason):
        took = int(((attempt.exited_at or time.monotonic()) - attempt.offered) * 1000)
        kept = attempt.kept
        self.alerts.add(Alert(verdict, status, took, int(time.time() * 1000), attempt.submission.id, kept.submitter,
                              kept.name, reason))

    # -- in words
    def _diagnosis(self, submission, since):
        search = self.search
        return Diagnosis(SearchFacts(
            list(self.heard.values()), str(self.settings.group), self.key.name, self.key.fingerprint,
            self.settings.group.port, self.port.number if self.port else 0, search.ways() if search else "",
            search.problems if search else (),
            ["%s: %s" % reason for reason in list(search.reasons.items())[-3:]] if search else (),
            self.no_port, submission.last_loss), since)

    def waiting_text(self, submission):
        """What a job waits for, in a line for the user."""
        now, since = time.monotonic(), submission.waiting_since
        return self._diagnosis(submission, now - RECENTLY).waiting(now - since, self._diagnosis(submission, since))


# ---------------------------------------------------------------- cexec

DESCRIPTOR_FLOOR = 64       # where duplicates of our own go: out of the way of what the user numbers
WAITING_AFTER = 2.0         # seconds until a line tells what is waited for
RUNNING_AFTER = 5.0         # seconds of a job until the line tells how far it is
COLLECT_AFTER = 1.0         # seconds; a job that ends before leaves its garbage to the system


class StatusLine:
    """A line on a terminal that is updated in place; it does nothing on anything else."""

    def __init__(self, fd):
        self.fd = fd
        self.shown = False
        self.usable = fd >= 0 and is_open(fd) and os.isatty(fd)

    def show(self, text):
        if self.usable and has_room():
            self.shown = True
            try:
                columns = os.get_terminal_size(self.fd).columns or 80
                os.write(self.fd, b"\r\x1b[K" + printable(text)[:columns - 1].encode("utf-8", "replace"))
            except OSError:
                self.usable = False

    def clear(self):
        if self.shown:
            self.shown = False
            try:
                os.write(self.fd, b"\r\x1b[K")
            except OSError:
                pass        # the terminal has gone

    def give_way(self):
        """To others that write on this terminal, for good."""
        self.clear()
        self.usable = False


class InheritedStreams(JobStreams):
    """The descriptors of this process, as its caller left them.  The CexecRun makes it, and hears of what breaks here:
    on_local_failure, on_hang_up, on_command."""
    HALF_CLOSED_AFTER = 0.02        # seconds: of a socket that the job has closed the other half ends in a moment

    def __init__(self, run, descriptors):
        super().__init__()
        self.run = run
        self.loop, self.settings, self.terminal = run.loop, run.settings, run.terminal
        self.descriptors = descriptors
        self.numbers = {}               # {descriptor: it and the others that share it}
        self.owned = {}                 # {descriptor: a duplicate for its sink}
        self.stopped = {}               # {input that the job reads no more: bytes of it that it has read}
        self.typed = None               # the TypedInput of -t
        self.failure = None             # what the end of the job has shown
        for fd, kind in descriptors.items():
            if isinstance(kind, int):
                self.numbers[kind].append(fd)
            else:
                self.numbers[fd] = [fd]
                self._open(fd, kind)

    def _open(self, fd, kind):
        ready = functools.partial(self.source_ready, fd)
        if kind == TTY:
            self._open_terminal(fd, ready)
        elif kind in (IN, BOTH):
            source = open_source(self.loop, fd, ready)
            self.sources[fd] = source if isinstance(source, FileSource) else ReplayableInput(source)
        if kind == BOTH:        # so that source and sink can wait for one descriptor each
            self.owned[fd] = duplicate(fd, min(DESCRIPTOR_FLOOR, os.sysconf("SC_OPEN_MAX") // 2))
        if kind in (OUT, BOTH):
            self._open_sink(fd, self.owned.get(fd, fd))

    def _open_sink(self, fd, own):
        make = open_sink
        if stream_kind(own) is TERMINAL:
            make = functools.partial(TerminalSink, before=self.run.status.give_way)
        self.sinks[fd] = make(self.loop, own, functools.partial(self.consumed, fd),
                              functools.partial(self._sink_failed, fd), functools.partial(self._output_over, fd))

    def _open_terminal(self, fd, ready):
        terminal = self.terminal
        if terminal.reading is not None:
            escape = self.settings.escape if terminal.tty is not None else b""
            self.sources[fd] = self.typed = TypedInput(self.loop, terminal.reading, ready, escape, self.run.on_command,
                                          functools.partial(self.read_error, fd))
        if terminal.writing is None:
            terminal.writing = os.open("/dev/tty" if terminal.tty is not None else os.devnull, os.O_WRONLY)
        self._open_sink(fd, terminal.writing)

    def reads_terminal(self):
        return any(stream_kind(fd) is TERMINAL for fd in self.sources)

    # -- on the job's way
    def prepare(self):
        """What copies of pipes need, while a worker is looked for."""
        if any(stream_kind(fd) is PIPE for fd in self.sources):
            pipe_calls()

    def copied(self):
        return frozenset(fd for fd, source in self.sources.items() if self.descriptors[fd] != TTY
                         and (len(self.numbers[fd]) == 1 or stream_kind(fd) is not SOCKET) and source.copies())

    def input_emptied(self, number):
        source = self.sources.get(number)       # a terminal that is only written to has none, whatever a worker says
        if source and not source.emptied():
            self.run.on_local_failure(self._not_there(number))

    def _not_there(self, number):
        return Failure(name_of(number), *self.sources[number].live.NOT_THERE)

    def accepted(self):
        for source in self.sources.values():
            source.remember(self.settings.replay << 20 if self.settings.retries else 0)
        if self.terminal:
            self.terminal.raw()
            if self.typed:
                self.typed.start()

    def moved(self):
        if self.terminal:
            self.terminal.restore()     # what is typed while no worker has the job, as Ctrl-C, is for cexec
            if self.typed:
                self.typed.stop()

    def visible(self):
        for source in self.sources.values():
            source.remember(0)

    def input_stopped(self, number, consumed):
        self.stopped[number] = consumed
        source = self.sources.get(number)
        if source and not isinstance(source, FileSource) and not source.commit(consumed):
            return self.run.on_local_failure(self._not_there(number))
        self._let_go(number)

    def ended(self, report):
        """What the job has read is taken: a regular file's offset is put behind it.  Without a report nothing is."""
        for fd, source in self.sources.items():
            if report and not source.commit(self.stopped.get(fd, report.consumed.get(fd, UNKNOWN))):
                self.failure = self.failure or self._not_there(fd)

    # -- local trouble
    def _sink_failed(self, fd, error):
        terminal = self.descriptors[fd] == TTY
        if terminal and error.errno in (errno.EIO, errno.EPIPE, errno.ECONNRESET):
            return self.run.on_hang_up()        # a terminal that nobody watches would hold up its job for ever
        reset = error.errno == errno.ECONNRESET and isinstance(self.sources.get(fd), ReplayableInput) and (
            not self.sources[fd].ended)
        if error.errno not in (errno.EPIPE, errno.ECONNRESET) or reset:     # its input may be cut short
            return self.run.on_local_failure(Failure("the terminal" if terminal else name_of(fd), reason_of(error),
                                                     "what the job wrote there is incomplete"))
        self._output_over(fd)

    def _output_over(self, fd):
        self.delivered.add(fd)
        self._let_go(fd)
        self.sink_finished(fd)

    def read_error(self, number, error):
        """What a source that cannot be read is taken for: nothing yet, or its end."""
        if self.descriptors[number] == TTY and error.errno == errno.EIO:
            self.loop.call_soon_threadsafe(self.run.on_hang_up)
            return None
        if error.errno != errno.EIO or stream_kind(number) is not TERMINAL:
            self.run.on_local_failure(Failure(name_of(number), reason_of(error)))
        return 0

    def _let_go(self, fd):
        """One direction of a local descriptor is over: whoever is at its other end must see that."""
        if fd in self.owned and fd in self.delivered:
            os.close(self.owned.pop(fd))
        if self.descriptors[fd] == TTY or stream_kind(fd) not in (PIPE, SOCKET):
            return
        if errors_place(self.settings) in self.numbers[fd]:
            return          # cexec's own last line may have to go there; it ends with the process
        writing, reading = fd in self.sinks and fd not in self.delivered, self._is_read(fd)
        if not writing and not reading:
            if fd in self.sources:
                self.sources[fd].end()
            for number in self.numbers[fd]:
                park(number)
        elif reading and stream_kind(fd) is SOCKET:
            self.loop.call_later(self.HALF_CLOSED_AFTER, functools.partial(self._half_close, fd))

    def _is_read(self, fd):
        return fd in self.sources and fd not in self.stopped

    def _half_close(self, fd):
        """The job has shut down one half of a socket, and not closed it: that would not concern others who share it."""
        if self._is_read(fd):
            with socket.socket(fileno=os.dup(fd)) as half:
                try:
                    half.shutdown(socket.SHUT_WR)
                except OSError:
                    pass        # the other side was faster


def name_of(fd):
    return ("standard input", "standard output", "standard error")[fd] if fd < 3 else "descriptor %d" % fd


class CexecRun:
    """One cexec: a Pool with one job, this process's descriptors and its signals."""

    def __init__(self, key, settings, descriptors, names, terminal):
        self.loop = Loop()
        self.settings = settings
        self.terminal = terminal
        self.began = time.monotonic()
        self.passed_on = set()          # names of the signals that this process got for the job
        self.status = StatusLine(-1 if settings.quiet or settings.verbose else errors_place(settings))
        self.pool = Pool(self.loop, key, settings, trace=self.trace)
        self.streams = InheritedStreams(self, descriptors)
        self.submission = Submission(self.streams, names, settings.retries, self._done, self.tell)

    def run(self):
        """(status, Failure or None, number of the signal to die of or None)."""
        for name in ("INT", "TERM", "QUIT", "USR1", "USR2"):
            self.loop.on_signal_unless_ignored(SIGNAL_NAMES[name], functools.partial(self._signal, name))
        self.loop.on_signal_unless_ignored(signal.SIGHUP, lambda number: self.on_hang_up())
        for number in (signal.SIGTSTP, signal.SIGTTOU):
            self.loop.on_signal_unless_ignored(number, self._suspend)
        if self.terminal:
            self.loop.on_signal_unless_ignored(signal.SIGTTIN, self._suspend)
        else:
            signal.signal(signal.SIGTTIN, signal.SIG_IGN)       # a read from the background is an error, and no stop
        self.loop.on_signal_unless_ignored(signal.SIGCONT, lambda number: self._resume())
        if self.terminal and self.terminal.tty is not None:
            self.loop.on_signal_unless_ignored(signal.SIGWINCH, lambda number: self._resize())
        self.loop.call_later(COLLECT_AFTER, gc.enable)
        if self.status.usable:
            self.loop.call_later(WAITING_AFTER, self._show_status)
        self.pool.submit(self.submission)
        self.loop.call_later(0, self.streams.prepare)
        try:
            return self.loop.run()
        finally:
            self.status.clear()         # here, for a timer may still show it in the round in which the job ends

    def _show_status(self):
        """Tells a user at a terminal what is waited for, and how far a long job is that uses no terminal."""
        attempt = self.submission.attempt
        if not attempt:
            self.status.show("cexec: %s" % self.pool.waiting_text(self.submission))
        elif attempt.is_running() and not self.terminal and not self.streams.reads_terminal():
            ran, channel = time.monotonic() - attempt.offered, attempt.channel
            if ran >= RUNNING_AFTER:
                self.status.show("cexec: running on %s: %.1f MB in, %.1f MB out, %.0f s" % (
                    self.submission.worker, channel.sent_total / 1e6, channel.received_total / 1e6, ran))
        if self.status.usable:
            self.loop.call_later(1.0, self._show_status)

    def _done(self, status, failure, submission):
        """A job that died of a signal that was sent on to it, or that did not start because of it, takes cexec with it,
        so that a shell's loop ends."""
        report, failure = submission.report, failure or self.streams.failure
        if report:
            self.trace("job %s ended on %s: %s %d after %.3f s" % (
                submission.id, submission.worker, "signal " + report.name if report.signalled else "status",
                report.number, report.milliseconds / 1000))
        name = submission.signalled if not report else report.name if report.signalled else None
        self._stop(status, failure, SIGNAL_NAMES[name] if name in self.passed_on and not failure else None)

    def _stop(self, status, failure=None, number=None):
        self.pool.close()
        self.loop.stop((status, failure, number))

    def trace(self, text):
        if self.settings.verbose:
            say(CEXEC, "%5d ms: %s" % ((time.monotonic() - self.began) * 1000, text), errors_place(self.settings))

    def tell(self, text, always=False):
        self.status.clear()
        if always and not self.settings.verbose:
            say(CEXEC, text, errors_place(self.settings))
        self.trace(text)

    # -- what streams say
    def on_local_failure(self, failure):
        self.pool.fail(self.submission, failure)

    def on_command(self, name):
        """What the user told cexec itself, behind the escape character."""
        if name == "end":
            self.pool.fail(self.submission, Failure("the job", "ended by the escape sequence"))
        else:
            self._suspend(signal.SIGTSTP, 0)        # the whole foreground group, as the key does elsewhere

    def on_hang_up(self):
        """The user's terminal has gone.  A job that lives on it ends; another one decides for itself."""
        self._signal("HUP", signal.SIGHUP)
        if self.terminal and self.submission.state is not JobState.DONE:
            self._die_of(signal.SIGHUP)

    # -- signals
    def _signal(self, name, number):
        """It goes to the job; a second INT or TERM, or a job that ignores it, ends cexec all the same."""
        self.passed_on.add(name)
        if not self.pool.signal(self.submission, name):
            self._die_of(number)
        elif name in ("INT", "TERM"):
            self.loop.call_later(SIGNAL_GRACE, lambda: self._die_of(number))

    def _die_of(self, number):
        self.pool.cancel(self.submission)
        self._stop(128 + number, None, number)

    def _suspend(self, number, whom=None):
        """Stops this process, or whom, as if nothing had caught the signal; a job without a terminal stops too."""
        self.pool.signal(self.submission, "TSTP")
        if self.terminal:
            self.terminal.restore()
        if number == signal.SIGTSTP or has_lost_terminal():
            watcher = wake_for_signals()
            handler = signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid() if whom is None else whom, number)
            signal.signal(number, handler)      # here it has been continued, or nobody could ever have continued it
            if watcher:
                os.kill(watcher, signal.SIGKILL)
                os.waitpid(watcher, 0)
        self._resume()

    def _resume(self):
        self.pool.signal(self.submission, "CONT")
        if self.terminal and any(stream_kind(fd) is TERMINAL and in_background(fd) for fd in self.streams.sources):
            stop_reading_group()        # a read that has begun would do it as well
        attempt = self.submission.attempt
        if self.terminal and attempt and attempt.is_running():
            self.terminal.raw()
            self._resize()

    def _resize(self):
        attempt = self.submission.attempt
        if attempt:
            attempt.resize(*self.terminal.size())


def cexec(arguments, settings):
    """cexec APP[.pub] [NAME=VALUE...]"""
    if settings.no_input:
        park(0)
    inherited = carried_descriptors(settings.max_fd)
    park_standard()
    if settings.errors_fd is not None:
        check_errors_fd(settings)
    if not arguments:
        raise Failure("no key given", "", "usage: cexec APP[.pub] [NAME=VALUE...]", EXIT_USAGE)
    names = [parse_name(word) for word in arguments[1:]]
    key, warning = load_key(arguments[0], "public")
    if warning:
        say(CEXEC, warning, errors_place(settings))
    terminal = LocalTerminal(settings, inherited) if settings.terminal else None
    if terminal and not terminal.is_ours():
        os.kill(0, signal.SIGTTOU)      # started in the background: stops until it gets the terminal, as editors do
    try:
        status, failure, number = CexecRun(key, settings, inherited, names, terminal).run()
    finally:
        if terminal:
            terminal.restore()
    if failure:
        raise failure
    if number:
        die_of(number)
    return status


def die_of(number):
    """Ends this process as if nothing had ever caught the signal."""
    if number == signal.SIGQUIT:
        import resource
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def check_errors_fd(settings):
    if settings.errors_fd <= settings.max_fd:
        raise Failure("CEXEC_FD_FOR_ERRORS=%d" % settings.errors_fd, "not above CEXEC_MAXFD (%d)" % settings.max_fd,
                      "the job would share it", EXIT_USAGE)
    if not is_open(settings.errors_fd):
        raise Failure("CEXEC_FD_FOR_ERRORS=%d" % settings.errors_fd, "not open", "", EXIT_USAGE)


NAME_RULE = "NAME is letters, digits and _, with no digit in front"


def parse_name(word):
    name, equals, value = os.fsencode(word).partition(b"=")
    if word.startswith("-"):
        raise Failure(word, "unknown option after the key", "options come before the key, see cexec --help", EXIT_USAGE)
    if not equals:
        raise Failure(word or "an empty parameter", "not NAME=VALUE", "the command was chosen where cservice was "
                      "started, a submitter cannot choose one; it can only tell it NAME=VALUE", EXIT_USAGE)
    if not is_name(name):
        raise Failure(word, "not NAME=VALUE", "the job finds VALUE in its environment as PEER_NAME, so " + NAME_RULE,
                      EXIT_USAGE)
    return name, value


# ---------------------------------------------------------------- cmap
#
# A Pool with many jobs.  What a job writes is held until it has ended, so a lost worker costs time and nothing else.
# Inputs are read only as slots come free; outputs leave whole, one after another.

NAME_MAX = 1 << 16          # bytes of a line that can still be a name
HASH_AT_ONCE = 1 << 23      # bytes of an input that are hashed before others have their turn
STEADY_TRIES = 3            # runs of a job whose input changes while it is read
FAILURES_SHOWN = 10         # failed jobs with a line of their own
PROGRESS_EVERY = 0.2        # seconds
PROGRESS_PLAIN = 60.0       # seconds from one line to the next where standard error is no terminal
SYNCERS = 8                 # threads that wait for outputs to be on the disk
UNSYNCED_MAX = 256          # outputs that may wait so
FINISH_SYNC = 5.0           # seconds that an interrupted cmap waits for them
NAMES_KEPT = 1000           # inputs whose names are known for a message
LOG_HEAD = "number\tkey\tstatus\tseconds\tworker\tin\tout\tname\toutput\n"
NUMBERED = object()         # the name of an input that has only its number
NO_MORE = object()          # no further input
RESERVED = 0xffffffff       # instead of an input's number: a file that no output may replace


def replaced(text, name, number):
    """The text with {}, {.}, {/}, {/.} and {#} replaced by the name, parts of it, and the number."""
    head, *rest = text.split(b"{")
    if not rest:
        return text
    last = (name or b"").rpartition(b"/")[2]
    values = {b"": name or b"", b".": os.path.splitext(name or b"")[0], b"/": last, b"/.": os.path.splitext(last)[0],
              b"#": b"%d" % number}
    for part in rest:
        mark, brace, tail = part.partition(b"}")
        if brace and name is None and mark in values and mark != b"#":
            raise JobFailure("", "its line is too long to be a name", "{#} is its number")
        head += values[mark] + tail if brace and mark in values else b"{" + part
    return head


def output_path(pattern, name, number):
    """The path of an output.  Failure for one that no file can have, or that would lie outside of the folder in which
    the pattern begins: names may come from strangers."""
    path, folder = replaced(pattern, name, number), os.path.dirname(pattern.partition(b"{")[0])
    lasts = [os.path.basename(path)] + ([name.rpartition(b"/")[2]] if name and b"{/" in pattern else [])
    if b"\0" in path:
        raise JobFailure(log_text(path), "no file's name has a NUL byte")
    if {b"", b".", b".."}.intersection(lasts):
        raise JobFailure(log_text(path), "no file can have this name")
    if folder and os.path.relpath(path, folder).startswith(b"../"):
        raise JobFailure(log_text(path), "it lies outside of %s, where --out begins" % log_text(folder))
    return path


def log_text(name):
    """A name as the log has it: one line, without tabs."""
    return "" if name is None else printable(name.replace(b"\\", b"\\\\"))


def input_failure(name, error):
    """What an input that cannot be had has met with, as a Failure."""
    if isinstance(error, Failure):
        return error
    hint = "" if not isinstance(error, FileNotFoundError) or not name else (
        "/dev/stdin is standard input" if name == b"-" else
        "its line ends as in DOS: tr -d '\\r' mends the list" if name.endswith(b"\r") else "")
    return JobFailure(log_text(name), reason_of(error), hint)


def short_hash(text):
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


class NameTable:
    """{16 bytes of a hash: number}, in at most 32 bytes for each: slots of 24, between three quarters and nine tenths
    of which are taken.  An entry may be marked with a number that can be looked for."""
    SLOT = struct.Struct("=16sII")

    def __init__(self):
        self.slots = 64
        self.used = 0
        self.table = bytearray(self.slots * self.SLOT.size)

    def _find(self, digest):
        """Where it stands, or would stand."""
        at = int.from_bytes(digest[:8], "big") % self.slots * self.SLOT.size
        while self.table[at:at + 16] not in (digest, bytes(16)):
            at = (at + self.SLOT.size) % len(self.table)
        return at

    def get(self, digest):
        """Its number; 0 for none."""
        return self.SLOT.unpack_from(self.table, self._find(digest))[1]

    def add(self, digest, number, mark=0):
        """Its number becomes this one."""
        at = self._find(digest)
        if self.SLOT.unpack_from(self.table, at)[0] != digest:
            self.used += 1
            if self.used > self.slots * 9 // 10:
                self._grow()
                at = self._find(digest)
        self.SLOT.pack_into(self.table, at, digest, min(number, 0xffffffff), mark)

    def _grow(self):
        old, self.slots = self.table, self.slots * 6 // 5 + 1
        self.table = bytearray(self.slots * self.SLOT.size)
        for digest, number, mark in self.SLOT.iter_unpack(old):
            if digest != bytes(16):
                self.SLOT.pack_into(self.table, self._find(digest), digest, number, mark)

    def has_mark(self, mark):
        return mark in memoryview(self.table).cast("I")[5::6]


class Claims:
    """The outputs of one run by their places, and its inputs by their files: no output may be lost to another one, to
    an input, or to what cmap would destroy by writing there.  A place is the folder, by device and inode, and the last
    name.  All numbers are those of inputs."""

    def __init__(self):
        self.table = NameTable()
        self.names = {}                 # {number: name} of the last inputs
        self.oldest = math.inf          # change time (ns) of the first file that this run has made
        self.new_in = set()             # folders in which folders were made, until somebody syncs them

    @staticmethod
    def _digest(*parts):
        return hashlib.sha256(repr(parts).encode()).digest()[:16]

    def _name(self, number):
        name = self.names.get(number)
        return "input %d" % number + (" (%s)" % log_text(name)[:200] if name else "")

    def input(self, number, name, status=None):
        """An input, and the os.stat_result of its file; Failure where that is an output of this run."""
        self.names[number] = name
        if len(self.names) > NAMES_KEPT:
            self.names.pop(number - NAMES_KEPT, None)
        if status and self.is_ours(status):
            raise JobFailure(log_text(name), "it is an output of this run")
        if status:
            self.read(status, number)

    def read_all(self, paths):
        """These are all the inputs, from the first on."""
        for number, path in enumerate(paths, 1):
            self.names[number] = os.fsencode(path)
            try:
                self.read(os.stat(path), number)
            except (OSError, ValueError):
                pass        # it is told when its turn comes

    def read(self, status, number):
        """This input reads a file, which no output may replace; the same file may be several inputs."""
        digest = self._digest(status.st_dev, status.st_ino)
        if stat.S_ISREG(status.st_mode) and not self.table.get(digest):
            self.table.add(digest, number)

    def is_ours(self, status):
        """Whether this run has made the file."""
        return status.st_ctime_ns >= self.oldest and self.table.has_mark(self._mark(status))

    def _mark(self, status):
        return int.from_bytes(self._digest("made", status.st_dev, status.st_ino)[:4], "big") | 1

    def _place(self, path, make):
        """The digest of a path's place; its folder is made where it is not there and `make` says so."""
        folder, last = os.path.split(path)
        while True:
            try:
                there = os.stat(folder or b".")
                if not stat.S_ISDIR(there.st_mode):
                    raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
                return self._digest(there.st_dev, there.st_ino, last)
            except FileNotFoundError:
                if make:
                    self._make(folder)
                else:
                    folder, above = os.path.split(folder.rstrip(b"/"))
                    last = os.path.join(above, last)

    def _make(self, folder):
        above = os.path.dirname(folder.rstrip(b"/"))
        if above and not os.path.isdir(above):
            self._make(above)
        try:
            os.mkdir(folder)
        except FileExistsError:
            if not os.path.isdir(folder):       # a link to nowhere; else somebody was quicker
                raise
        self.new_in.add(above or b".")

    def output(self, path, number, make=True):
        """Claims the place of an output.  Failure where another input has it, or the file there must stay; OSError
        where there can be none."""
        place = self._place(path, make)
        if make and not os.access(os.path.dirname(path) or b".", os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "its folder may not be written to")
        other = self.table.get(place)
        if other and other != number:
            raise JobFailure(log_text(path), "it is the output of %s as well" % self._name(other))
        self.standing(path, number)
        self.table.add(place, number)

    def standing(self, path, number):
        """The os.stat_result of the file that an output replaces, None where there is none.  Failure where what
        stands there may not be replaced."""
        try:
            there = os.lstat(path)
        except FileNotFoundError:
            return None
        kind = {stat.S_IFREG: "", stat.S_IFDIR: "a folder", stat.S_IFLNK: "a symbolic link"}.get(
            stat.S_IFMT(there.st_mode), "no regular file")
        reader = self.table.get(self._digest(there.st_dev, there.st_ino))
        if kind:
            raise JobFailure(log_text(path), "%s stands there" % kind)
        if reader:
            raise JobFailure(log_text(path), "the output would replace %s" % (
                "its input" if reader == number else "a file that cmap uses" if reader == RESERVED else
                self._name(reader)))
        if self.is_ours(there):
            raise JobFailure(log_text(path), "another output of this run stands there under the name")
        return there

    def made(self, path, number, status):
        """The output of this input stands there now."""
        self.oldest = min(self.oldest, status.st_ctime_ns)
        self.table.add(self._place(path, False), number, self._mark(status))


class MapJob(BatchJob):
    """One input, and what becomes of it.  MapInputs makes it, Cmap ends it."""
    __slots__ = ("name", "names", "data", "head", "path", "failure", "left_out", "unsteady", "spare", "output", "began")

    def __init__(self, name, data, head):
        super().__init__()
        self.name = name            # bytes; None when that would be too long
        self.names = []             # [(NAME, VALUE)] that the job is told
        self.data = data            # what a HeldInput takes
        self.head = head            # bytes that stand before that
        self.path = None            # of its output file
        self.failure = None         # why there is no input
        self.left_out = False       # an earlier run has done it
        self.unsteady = 0           # runs during which the input has changed
        self.spare = None           # the run of two that has failed first
        self.output = None          # a Spool for standard output, once it has ended
        self.began = time.monotonic()

    def end(self):
        if isinstance(self.data, Spool):
            self.data.clear()


class InputSpool(Spool):
    """An input that comes in pieces.  failure: why it cannot be kept; the rest of it is passed over."""
    __slots__ = ("failure",)

    def __init__(self, budget, files=None):
        super().__init__(budget, files)
        self.failure = None


class FifoSource(Source):
    """A named pipe that was opened without waiting for its first writer: until then it would seem to be at its end."""

    def __init__(self, loop, fd, ready):
        super().__init__(loop, fd, ready)
        self.begun = False              # something has come, or a writer has gone again

    def _read(self, view):
        if not self.begun:
            raise BlockingIOError
        return super()._read(view)

    def _readable(self):
        self.begun = True
        super()._readable()


class MapInputs:
    """Makes MapJobs of what an InputReader finds, each when it is asked for: their parameters, their outputs' places,
    whether an earlier run has done them.  jobs() yields them; None means that there is nothing now, and that ready()
    will be called once there is."""

    def __init__(self, loop, settings, reader, claims, log, ready):
        self.loop = loop
        self.settings = settings
        self.reader = reader
        self.claims = claims
        self.log = log
        self.ready = ready
        self.buffer = memoryview(bytearray(BUFFER))
        self.names = [parse_name(word) for word in settings.names.split("\0") if word]

    def jobs(self):
        number = 0
        for found in self.reader.found():
            if found is None:
                yield None
                continue
            number += 1
            name, data, *head = found
            job = MapJob(b"%d" % number if name is NUMBERED else name, data, b"".join(head))
            try:
                self._prepare(job, number)
                if self.settings.resume and self.log.may_have(job):
                    yield from self._compare(job)
            except LocalFailure:
                raise
            except (Failure, OSError) as error:
                job.failure = input_failure(job.name, error)
            yield job

    def _prepare(self, job, number):
        settings, status = self.settings, None
        if isinstance(job.data, str) and self.claims:
            status = os.stat(job.data)
        if self.claims:
            self.claims.input(number, job.name, status)
        if isinstance(job.data, Failure):
            raise job.data
        if settings.value:
            job.names.append((os.fsencode(settings.value), bytes(job.data)))
            job.data = b""
        job.names += [(name, replaced(value, job.name, number)) for name, value in self.names]
        if any(b"\0" in value for _, value in job.names):
            raise JobFailure("NAME=VALUE", "a NUL byte, which no environment can hold")
        if settings.out:
            job.path = output_path(os.fsencode(settings.out), job.name, number)
            for path in (job.path, job.path + b".failed") if settings.keep_failed else (job.path,):
                self._claim(path, number)

    def _claim(self, path, number):
        try:
            self.claims.output(path, number, not self.settings.dry_run)
        except OSError as error:
            begins = os.path.dirname(os.fsencode(self.settings.out).partition(b"{")[0])
            all_alike = error.errno != errno.ENAMETOOLONG and (
                os.path.dirname(path) == begins or begins and not os.path.isdir(begins))
            raise (LocalFailure if all_alike else JobFailure)(log_text(path), reason_of(error)) from None

    def _compare(self, job):
        """Whether the log says that this has been done: a long input takes several turns."""
        source = HeldInput(job.data, head=job.head, digest=self.log.digest(job))
        try:
            while source.read_into(self.buffer):
                if source.position // HASH_AT_ONCE != (source.position - BUFFER) // HASH_AT_ONCE:
                    self.loop.call_soon_threadsafe(self.ready)
                    yield None
            job.left_out = self.log.has(job, source.hash) and not source.has_changed()
        finally:
            source.end()


class InputReader:
    """Reads what inputs are made of: files, lines, blocks.  busy(): whether jobs are under way, which free what they
    hold.  ready() is called when there is more to be found."""

    def __init__(self, loop, settings, operands, claims, ready, busy):
        self.loop = loop
        self.settings = settings
        self.operands = operands
        self.claims = claims
        self.ready = ready
        self.busy = busy
        self.budget = Budget()
        self.buffer = memoryview(bytearray(BUFFER))

    def found(self):
        """Yields (name, input[, head]) for each, with a Failure in place of an input that cannot be read; None where
        there is nothing now."""
        try:
            yield from self._found()
        except OSError as error:        # the list, or what is cut into blocks
            path = self.settings.list
            raise LocalFailure("--from=" + path if path not in ("", "-") else "standard input",
                               reason_of(error)) from None

    def _found(self):
        settings = self.settings
        if settings.block or settings.cut_before:
            mark = b"" if settings.cut == "bytes" else b"\n" + os.fsencode(settings.cut_before)
            return self._blocks(settings.block or 1, mark)
        if settings.lines:
            return self._line_jobs(settings.count or 1)
        if settings.value:
            return self._line_jobs(1)
        if settings.list:
            return self._listed(b"\0" if settings.nul else b"\n")
        return (found for path in self.operands for found in self._file(path))

    def _listed(self, end):
        for line in self._lines(self.settings.list, end):
            name = line and bytes(line)[:-1 if bytes(line).endswith(end) else None]
            if line is None:
                yield None
            elif name:
                yield from self._file(os.fsdecode(name))

    def _file(self, path):
        """A regular file is read when its job runs; what comes out of a pipe is kept first."""
        name = os.fsencode(path)
        try:
            if b"\0" in name:
                raise JobFailure(log_text(name), "no file's name has a NUL byte")
            if not stat.S_ISFIFO(os.stat(path).st_mode):
                yield name, path
                return
            spool = InputSpool(self.budget)
            for piece in self._pieces(path):
                if piece is None:
                    yield None
                else:
                    yield from self._keep(spool, piece)
            yield name, spool.failure or spool
        except (Failure, OSError) as error:
            yield name, input_failure(name, error)

    def _line_jobs(self, count):
        """Each line, or `count` of them together, behind the first one of their file where that is their header."""
        for path in self.operands or ["-"]:
            head, group, left = b"", None, count
            wants_head = self.settings.header
            try:
                for line in self._lines(path, b"\n"):
                    if line is None:
                        yield None
                    elif wants_head:
                        head, wants_head = bytes(line), False
                    elif count == 1:
                        yield (*self._one_line(line), head)
                    else:
                        group = InputSpool(self.budget) if group is None else group
                        for piece in line.pieces() if isinstance(line, Spool) else (line,):
                            yield from self._keep(group, piece)
                        left -= 1
                        if not left:
                            yield NUMBERED, group.failure or group, head
                            group, left = None, count
            except OSError as error:
                yield os.fsencode(path), input_failure(os.fsencode(path), error)
            if group is not None:
                yield NUMBERED, group.failure or group, head

    def _one_line(self, line):
        """(name, input)"""
        name = bytes(line) if len(line) <= NAME_MAX else None
        name = name[:-1] if name and name[-1:] == b"\n" else name
        if isinstance(line, InputSpool) and line.failure:
            return name, line.failure
        if not self.settings.value:
            return name, line
        if name is None:
            failure = JobFailure("a line of %d bytes" % len(line), "too long for --value")
            if isinstance(line, Spool):
                line.clear()
            return name, failure
        return name, name

    def _pieces(self, path):
        """What comes from standard input or a file, a buffer at a time, which the next one replaces."""
        fd = 0 if path == "-" else os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if self.claims:
            self.claims.read(os.fstat(fd), RESERVED)
        fifo = fd and stat.S_ISFIFO(os.fstat(fd).st_mode)
        source = (FifoSource if fifo else open_source)(self.loop, fd, self.ready)
        try:
            while True:
                size = source.read_into(self.buffer)
                if size == 0:
                    break
                yield size and self.buffer[:size]
        finally:
            source.close()
            if fd:
                os.close(fd)

    def _keep(self, spool, data):
        """Adds to a spool; yields None while the temporary folder takes no more and others may free some of it."""
        if not spool.failure:
            spool.append(data)
        while spool.trouble and len(spool.memory) > Spool.MEMORY_EACH and not spool.write_out():
            if self.busy():
                yield None
            elif len(spool.memory) <= Spool.MEMORY_ALL:
                break
            else:
                spool.failure = JobFailure("%d bytes of it" % spool.size, "no room in %s: %s" % (
                    spool.files.place(), reason_of(spool.trouble)), "TMPDIR names another folder")
                spool.clear()

    def _lines(self, path, end):
        """Each line with its end, as bytes, or as an InputSpool where it came in pieces."""
        rest = InputSpool(self.budget)
        for piece in self._pieces(path):
            if piece is None:
                yield None
                continue
            at, data = 0, bytes(piece)
            while True:
                cut = data.find(end, at) + 1
                if not cut:
                    break
                if rest.size or rest.failure:
                    yield from self._keep(rest, data[at:cut])
                    yield rest
                    rest = InputSpool(self.budget)
                else:
                    yield data[at:cut]
                at = cut
            if at < len(data):
                yield from self._keep(rest, data[at:])
        if rest.size or rest.failure:
            yield rest

    def _blocks(self, size, mark):
        """Blocks of at most `size` bytes, cut behind the first byte of the last `mark` in them, or at `size` where that
        is empty; what has no mark so soon is a block by itself.  The first line may be the header of each."""
        block, cut, tail, more = InputSpool(self.budget), 0, b"", max(0, len(mark) - 1)
        head, wants_head = b"", self.settings.header
        for piece in self._pieces("-"):
            if piece is None:
                yield None
                continue
            piece = bytes(piece)
            if wants_head:
                at = piece.find(b"\n") + 1
                head, piece, wants_head = head + piece[:at or None], piece[at:] if at else b"", not at
            while piece or cut == block.size >= size + more:
                if block.size >= size + more and cut > 0:       # it is full, and something follows
                    rest = block.cut(cut)
                    yield NUMBERED, block, head
                    block, cut = rest, 0
                    continue
                part = piece[:max(0, size + more - block.size)]
                if not part:            # it is full, and there is no mark yet
                    at = (tail + piece).find(mark)
                    part = piece[:at + len(mark) - len(tail)] if at >= 0 else piece
                found = (tail + part).rfind(mark) + 1 if mark else len(part)
                cut = block.size - len(tail) + found if found else cut
                tail = (tail + part)[-more:] if more else b""
                yield from self._keep(block, part)
                if block.failure:
                    raise LocalFailure("a block of standard input", block.failure, block.failure.hint)
                piece = piece[len(part):]
        if block.size > size and cut > 0:
            rest = block.cut(cut)
            yield NUMBERED, block, head
            block = rest
        if block.size:
            yield NUMBERED, block, head


class OutputFile(TemporaryFile):
    """A file beside the place of a job's output, which it gets only by put()."""
    waits = False

    def __init__(self, path, budget):
        self.path = path
        self.budget = budget
        self.partial = None

    def place(self):
        return log_text(self.path)

    def open(self):
        folder = os.path.dirname(self.path)
        partial = os.path.join(folder, b".cmap-" + os.urandom(8).hex().encode())
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            fd = os.open(partial, flags, 0o666)
        except FileNotFoundError:       # it was there when the name was claimed
            os.makedirs(folder, exist_ok=True)
            fd = os.open(partial, flags, 0o666)
        self.partial = partial
        return fd

    def close(self, fd):
        os.close(fd)
        if self.partial:
            partial, self.partial = self.partial, None
            try:
                os.unlink(partial)
            except FileNotFoundError:
                pass        # somebody swept

    def put(self, spool, path, claims, number):
        """What the spool holds is the output of this input: it gets its name.  Failure where that cannot be."""
        spool.write_out()
        try:
            replaces, own = claims.standing(path, number), os.fstat(spool.fd)
            if replaces:        # without the bits that a write takes away as well
                os.fchmod(spool.fd, replaces.st_mode & 0o777)
            there = os.lstat(self.partial)
            if (there.st_dev, there.st_ino) != (own.st_dev, own.st_ino):
                raise JobFailure(self.place(), "somebody has replaced its temporary file")
            os.rename(self.partial, path)
        except OSError as error:
            raise JobFailure(log_text(path), reason_of(error)) from None
        self.partial = None
        claims.made(path, number, os.fstat(spool.fd))


class OrderedWriter:
    """Writes to a descriptor, which may be slow or shared, one thing after another, each whole."""

    def __init__(self, loop, fd, on_failed):
        self.queue = collections.deque()    # (what yields its pieces, whom to call when it is written); first: in hand
        self.pieces = self._pieces()
        self.unsent = 0                     # bytes of the last piece that the system has not taken
        self.busy = False
        self.sink = open_sink(loop, fd, self._sent, on_failed, lambda: None)

    def add(self, pieces, done):
        self.queue.append((pieces, done))
        self._go()

    def is_idle(self):
        return self.sink.done or not self.queue

    def _sent(self, size):
        self.unsent -= size
        self._go()

    def _go(self):
        if self.busy:
            return
        self.busy = True
        while not self.unsent and not self.sink.done:
            piece = next(self.pieces)
            if piece is None:
                break
            self.unsent = len(piece)
            self.sink.feed(piece)
        self.busy = False

    def _pieces(self):
        """Those of all that is queued, in turn; None when there is nothing for now."""
        while True:
            while self.queue:
                pieces, done = self.queue[0]
                yield from filter(len, pieces)
                self.queue.popleft()
                done()
            yield None


def marked_lines(mark, spool):
    """What a job wrote, each line behind the mark."""
    at_start = True
    for piece in spool.pieces():
        data = bytes(piece)
        ends = data.endswith(b"\n")
        lines = (data[:-1] if ends else data).replace(b"\n", b"\n" + mark)
        yield memoryview((mark if at_start else b"") + lines + (b"\n" if ends else b""))
        at_start = ends
    if not at_start:
        yield memoryview(b"\n")


def sync_output(fd, folders):
    """Returns when an output and its name are on the disk: None, or the OSError."""
    try:
        os.fsync(fd)
        for folder in folders:
            try:
                above = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except PermissionError:
                continue        # a folder that may be written to but not read
            try:
                os.fsync(above)
            finally:
                os.close(above)
    except OSError as error:
        return None if error.errno in UNSUPPORTED else error
    return None


def sync_copy(fd, folders):
    """The same, and closes fd."""
    try:
        return sync_output(fd, folders)
    finally:
        os.close(fd)


class MapLog:
    """The file of --log: a line for each job that has ended, when its output is on the disk.  With resume, `done` knows
    what ended with 0 before.  key_digest: of the app's key, with which every content key begins.  untouched: what is
    there is read, and nothing changed."""

    def __init__(self, path, resume, key_digest, loop, untouched=False):
        self.path = path
        self.untouched = untouched
        self.key_digest = key_digest
        self.loop = loop
        self.done = {}              # {hash of an output's name: (hash of its content key, bytes)}
        self.unsynced = 0
        self.helpers = []
        self.old = False            # an older cmap wrote it, and did not say which output a line is of
        flags = os.O_RDONLY | os.O_NONBLOCK if untouched else os.O_RDWR | os.O_CREAT | os.O_APPEND
        there = os.devnull if untouched and not os.path.exists(path) else path
        try:
            self.fd = os.open(there, flags | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise Failure("--log=" + path, reason_of(error), status=EXIT_USAGE) from None
        if stat.S_ISREG(os.fstat(self.fd).st_mode) and os.fstat(self.fd).st_size:
            self._read(resume)
        else:
            self._write(LOG_HEAD)

    def _read(self, resume):
        old_head = LOG_HEAD.rpartition("\t")[0] + "\n"
        with open(self.path, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
            head = file.readline()
            if head not in (LOG_HEAD, old_head):
                raise Failure(self.path, "not a log of cmap", "its first line is not cmap's", EXIT_USAGE)
            for line in file:
                if not line.endswith("\n"):     # it was cut when its writer was
                    cut = os.fstat(self.fd).st_size - len(line.encode("utf-8", "surrogateescape"))
                    if not self.untouched:
                        os.ftruncate(self.fd, cut)
                    break
                fields = line[:-1].split("\t")
                if line == LOG_HEAD:
                    head = line
                elif resume and len(fields) == LOG_HEAD.count("\t") + 1 and fields[2] == "0" and whole(
                        fields[6]):
                    self.done[short_hash(fields[8])] = short_hash(fields[1]), int(fields[6])
        if head == old_head:
            self.old = True
            self._write(LOG_HEAD)

    def digest(self, job):
        """Of hashlib: what comes before the input's bytes in its content key."""
        digest = self.key_digest.copy()
        for name, value in job.names:
            digest.update(b"%d %s=%s" % (len(name) + len(value), name, value))
        return digest

    def may_have(self, job):
        """Whether its output is there as the log says, so that it is worth while to look at the input."""
        _, size = self.done.get(short_hash(log_text(job.path)), (0, None))
        try:
            there = os.lstat(job.path)
        except OSError:
            return False
        return stat.S_ISREG(there.st_mode) and there.st_size == size

    def has(self, job, digest):
        key, _ = self.done.get(short_hash(log_text(job.path)))
        return key == short_hash(digest.hexdigest()[:32])

    def add(self, job, status, key, seconds, worker, received, sent, output=None, fd=None, folders=()):
        """A job has ended; output: the path of the file that it made, which is to be synced by way of fd."""
        line = "%d\t%s\t%d\t%.3f\t%s\t%d\t%d\t%s\t%s\n" % (
            job.number, key, status, seconds, worker or "-", received, sent, log_text(job.name), log_text(output))
        if fd is None:
            return self._write(line)
        if len(self.helpers) < SYNCERS:
            self.helpers.append(Helper(self.loop))
        self.unsynced += 1
        copy, done = None, functools.partial(self._synced, line, output)
        try:
            copy = os.dup(fd)
            self.helpers[job.number % len(self.helpers)].call(functools.partial(sync_copy, copy, folders), done)
        except (Failure, OSError):      # no thread, or no descriptor: all wait for it
            if copy is not None:
                os.close(copy)
            done(sync_output(fd, folders))

    def finish(self):
        """Waits for what is to be synced, at most some seconds, and writes what is to be said of it."""
        until = time.monotonic() + FINISH_SYNC
        while self.unsynced and time.monotonic() < until:
            self.loop.step()

    def _synced(self, line, output, error):
        self.unsynced -= 1
        if error:
            raise LocalFailure(log_text(output), reason_of(error))
        self._write(line)

    def _write(self, line):
        data = b"" if self.untouched else line.encode()
        try:
            while data:
                data = data[os.write(self.fd, data):]
        except OSError as error:
            raise LocalFailure(self.path, reason_of(error)) from None


class MapTally:
    """What has become of the jobs of a run of cmap so far, and what its user sees of that on standard error.

    total: how many inputs there are; None while that is not known.
    """

    def __init__(self, settings, total):
        self.settings = settings
        self.total = total
        self.done = 0
        self.failed = 0
        self.left_out = 0               # an earlier run had done them
        self.lost = 0                   # workers lost
        self.trouble = None             # the first job that the cluster failed, and the Failure
        self.status = StatusLine(-1 if settings.quiet else 2)
        self.began = self.told_at = time.monotonic()

    def say(self, line):
        if line and has_room():
            self.status.clear()
            say(CMAP, line)

    def show(self, running, workers):
        """Tells how far it is: how many jobs run on how many workers."""
        if self.status.usable:
            self.status.show(self._progress(running, workers))
        elif not self.settings.quiet and time.monotonic() - self.told_at >= PROGRESS_PLAIN:
            self.told_at = time.monotonic()
            self.say(self._progress(running, workers))

    def count(self, job, status, failure, run):
        """A job is over."""
        self.done += 1
        if failure and run and not isinstance(failure, JobFailure) and not self.trouble:
            self.trouble = job, failure
        if status or failure:
            self.failed += 1
            if failure or self.failed <= FAILURES_SHOWN and not self.settings.quiet:
                self.say("input %d (%s): %s" % (job.number, log_text(job.name)[:200],
                                                self._failure(job, status, failure, run)))

    def _failure(self, job, status, failure, run):
        if failure:
            words = failure.why if failure.what == log_text(job.name) else str(failure)
            return words + ("; " + failure.hint if isinstance(failure, JobFailure) and failure.hint else "")
        reason = run.refusal or (run.report.reason if run.report else
                                 "it ran for %g s, --timeout" % self.settings.timeout)
        return "status %d on %s%s" % (status, run.worker, ": " + reason if reason else "")

    def _count_done(self):
        return "%d%s done" % (self.done, " of %d" % (self.total - self.left_out) if self.total else "")

    def _progress(self, running, workers):
        took, rest = time.monotonic() - self.began, None
        if self.total and self.done:
            rest = (self.total - self.done - self.left_out) * took / self.done
        return "%s, %d failed, %d running on %s%s%s" % (
            self._count_done(), self.failed, running, count_text(workers, "worker"),
            ", %.1f a second" % (self.done / took) if self.done else "",
            ", %.0f s left" % rest if rest is not None else "")

    def summary(self, workers):
        """workers: the WorkerRecords."""
        took, spread = time.monotonic() - self.began, workers.spread_text()
        return "%s, %d failed%s%s%s%s, %.1f s%s" % (
            count_text(self.done, "job"), self.failed,
            "" if not spread else " (%s)" % spread if self.failed else " in the end (%s at first)" % spread,
            ", %d left out as done before" % self.left_out if self.settings.resume else "",
            ", %d started again" % self.lost if self.lost else "",
            ", on %s" % count_text(len({record.name for record in workers.records.values()}), "worker"), took,
            ", %.1f a second" % (self.done / took) if workers.ended else "")

    def interrupted(self):
        """What was done, and how to go on."""
        return "interrupted: %s%s; %s" % (
            self._count_done(), ", %d failed" % self.failed if self.failed else "",
            "the same command goes on from there" if self.settings.resume else
            "the same command with --resume goes on from there" if self.settings.log and self.settings.out else
            "with --log FILE and --out PATTERN a run can be gone on with by --resume")


class Cmap:
    """One run: takes inputs, gives them to the Pool, and makes one result of what comes back.  The Batch knows what is
    to be done next."""

    def __init__(self, key, settings, operands):
        self.loop = Loop()
        self.settings = settings
        self.pool = Pool(self.loop, key, settings, most=settings.jobs, keep=True, on_ready=self._pump)
        self.batch = Batch(settings.jobs, settings.again, bool(settings.halt), not (settings.unordered or settings.out),
                           self.pool.working, self.pool.serving)
        self.budget = Budget(settings.spill, self._all_is_written)
        self.file_budget = Budget()     # of outputs that get files of their own
        self.claims = Claims() if settings.out else None
        self.log = MapLog(
            settings.log, settings.resume, hashlib.sha256(key.fingerprint.encode()), self.loop, settings.dry_run
        ) if settings.log else None
        reads_parts = settings.list or settings.lines or settings.value or settings.block or settings.cut_before
        self.tally = MapTally(settings, None if reads_parts else len(operands))
        if self.claims and not reads_parts:
            self.claims.read_all(operands)
        if self.log and self.claims:
            self.claims.read(os.fstat(self.log.fd), RESERVED)
        reader = InputReader(self.loop, settings, operands, self.claims, self._pump, lambda: self.batch.going)
        self.inputs = MapInputs(self.loop, settings, reader, self.claims, self.log, self._pump).jobs()
        self.buffer = memoryview(bytearray(BUFFER))
        self.writer = None if settings.out and not settings.dry_run else OrderedWriter(
            self.loop, 1, self._output_failed)
        self.errors = OrderedWriter(self.loop, 2, lambda error: None)
        self.full = ""                  # what was said about the temporary folder
        self.terminated = None          # SIGTERM, once it has come
        self.pumping = False
        self.starved = False            # the next input has not come yet

    def run(self):
        """The number of the signal to die of, or None.  A Failure ends all."""
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
            self.loop.on_signal_unless_ignored(number, self.loop.stop)
        self.loop.on_signal_unless_ignored(signal.SIGTERM, self._terminate)
        self.loop.call_soon_threadsafe(self._pump)
        self.loop.call_later(PROGRESS_EVERY, self._tick)
        if self.log and self.log.old and self.settings.resume:
            self.tally.say("%s: an older cmap wrote it and did not say which output a line is of: no job counts as done"
                      % self.settings.log)
        try:
            return self.loop.run()
        finally:
            self.tally.status.clear()
            self.batch.stop()
            self.pool.close()
            for job in self.batch.unfinished():
                for run in (*job.runs, job.spare):
                    self._discard(run)
            if self.log:
                self.log.finish()

    # -- inputs
    def _pump(self):
        """Begins jobs as long as there is room for them."""
        if self.pumping:
            return
        self.pumping = True
        try:
            while self._has_room():
                job = next(self.inputs, NO_MORE)
                self.starved = job is None
                if self.starved:
                    break
                if job is NO_MORE:
                    self.batch.complete()
                    self.tally.total = self.batch.taken
                else:
                    self._begin(job)
        finally:
            self.pumping = False
        more = self.settings.jobs if self.tally.total is None else self.tally.total - self.batch.taken
        wanted = self.batch.state is TAKING and not self.starved and self.budget.has_room()
        self.pool.more = min(self.settings.jobs, more) if wanted else 0
        if self.settings.hedge:
            self._hedge()
        self._maybe_over()

    def _has_room(self):
        held_back = sum(bool(run.job.failed_on) for run in self.pool.queue) if self.batch.workers.failed else 0
        return (self.batch.wants_job(held_back) and self.pool.has_capacity(held_back) and self.budget.has_room()
                and not (self.log and self.log.unsynced >= UNSYNCED_MAX))

    def _begin(self, job):
        self.batch.add(job)
        if job.failure:
            self._over(job, None, job.failure)
        elif job.left_out:
            self.tally.left_out += 1
            self._close(job)
        elif self.settings.dry_run:
            self._print_plan(job)
        else:
            self._run(job)

    def _print_plan(self, job):
        """--dry-run: the input's name and the output's."""
        line = "%s\t%s\n" % (log_text(job.name), log_text(job.path) if job.path else "-")
        self.tally.done += 1
        self.writer.add(iter([memoryview(line.encode())]), lambda: None)
        self._close(job)

    def _run(self, job, avoid=None):
        """Starts it on a worker; a second time if one is to be avoided."""
        try:
            run = MapRun(job, self)
        except Failure as failure:
            job.twins += bool(job.runs)         # the one that runs has what it needs
            return None if job.runs else self._over(job, None, failure)
        if avoid:
            run.avoidance.avoid(avoid)
        self.batch.start(job, run)
        self.pool.submit(run)
        return None

    def _hedge(self):
        """Nothing is left to begin: the jobs that have run for longest start a second time, as slots come free."""
        while self.pool.has_capacity() and len(self.pool.running) < self.settings.jobs:
            job = self.batch.twin_wanted(MapRun.began_at)
            if not job:
                break
            self._run(job, job.runs[0].instance)

    # -- ends
    def run_over(self, run, status, failure):
        """A run has ended, with a status or a Failure; if the log wants it the whole input is hashed first."""
        source = run.source
        if status == 0 and source.hash and not failure:
            run.sent = run.sent or source.position
            for _ in range(HASH_AT_ONCE // BUFFER):
                if not source.read_into(self.buffer):
                    break
            else:
                return self.loop.call_soon_threadsafe(functools.partial(self.run_over, run, status, failure))
        if isinstance(failure, JobRefused):
            status, failure, run.refusal = EXIT_USAGE, None, str(failure)
        job = run.job
        if run not in job.runs:         # meanwhile the other one has ended
            return self._discard(run)
        self.tally.lost += run.lost
        if isinstance(failure, LocalFailure):
            raise failure
        if isinstance(failure, NoWorker) and len(job.runs) == 1:
            raise Failure("input %d (%s)" % (job.number, log_text(job.name)[:200]), failure, failure.hint)
        if source.has_changed() and not isinstance(failure, NoWorker):
            job.unsteady += 1
            failure, again = JobFailure(log_text(job.name), "it changes while it is read"), job.unsteady < STEADY_TRIES
            if again and self.batch.state is not STOPPING:
                self._drop_waiting_twin(job, run)
                self.batch.forget(job, run)
                self._discard(run)
                return None if job.runs else self._run(job)
        return self._count(run, status, failure)

    def _drop_waiting_twin(self, job, run):
        """This run is of no use, and its twin, which has no worker yet, may never get one: it avoids this one's."""
        for twin in [each for each in job.runs if each is not run and not each.has_begun()]:
            self.batch.forget(job, twin)
            self.pool.cancel(twin)
            self._discard(twin)

    def count_worker(self, run, failed):
        """A run has ended on its worker, or was refused there for good."""
        self.tally.say(self.batch.workers.add(run.instance, run.worker, failed, time.monotonic()))

    def _count(self, run, status, failure):
        job, now = run.job, time.monotonic()
        outcome = LOST if failure else NOT_TAKEN if run.refusal else FAILED if status else SUCCEEDED
        run.result = status, failure
        if not failure and not run.refusal:
            self.count_worker(run, outcome is FAILED)
        if outcome is not SUCCEEDED:
            self._drop_waiting_twin(job, run)
        decision = self.batch.ended(job, run, outcome, run.instance, now)
        if decision is WAIT:            # for its twin; until then this is what there is
            self._discard(job.spare)
            job.spare = run
        elif decision is AGAIN:
            self._pass_on_errors(run)
            self._discard(job.spare)
            self._discard(run)
            job.spare = None
            self._run(job)
            self.loop.call_later(ELSEWHERE, self.pool.announce_again)       # then the same worker may have it
        else:
            if outcome is LOST and job.spare:
                run, job.spare = job.spare, run
            self._over(job, *run.result, run)
        return None

    def _over(self, job, status, failure, run=None):
        """What counts of a job: a status, or a Failure of the cluster or of its input."""
        self._cancel(job, run)
        if run and not failure and job.path:
            try:
                self._put(job, status, run)
            except LocalFailure:
                self._discard(run)
                raise
            except Failure as error:
                failure = error
        self._write_log(job, status, failure, run)
        self.tally.count(job, status, failure, run)
        if run:
            self._pass_on_errors(run)
            if self.writer and run.report and not failure:      # it is whole
                job.output = run.streams.output
                run.streams.output = Spool(self.budget)
            self._discard(run)
        self._close(job, bool(status or failure))
        if self.batch.state is STOPPING and self.settings.halt:
            self._begin_no_more(now=self.settings.halt == "now")

    def _put(self, job, status, run):
        """The output gets its name; one of a failed job another one, where that is wanted."""
        path = job.path if status == 0 else job.path + b".failed" if self.settings.keep_failed else None
        if path:
            run.output_file.put(run.streams.output, path, self.claims, job.number)
            run.path = path

    def _write_log(self, job, status, failure, run):
        if not self.log:
            return
        if not run:
            self.log.add(job, EXIT_TEMPORARY, "-", 0.0, None, 0, 0)
            return
        source, output = run.source, run.streams.output
        took = (run.report.milliseconds / 1000 if run.report else time.monotonic() - job.began if failure or run.refusal
                else self.settings.timeout)
        folders = [os.path.dirname(run.path) or b".", *self.claims.new_in] if run.path else ()
        if run.path:
            self.claims.new_in.clear()
        self.log.add(job, EXIT_TEMPORARY if failure else status,
                     source.hash.hexdigest()[:32] if status == 0 and not failure else "-", took, run.worker,
                     run.sent if run.sent is not None else source.position, output.size, run.path,
                     output.fd if run.path else None, folders)

    def _close(self, job, failed=False):
        """It is over; its output waits for its turn."""
        job.end()
        self.batch.settle(job, failed)
        for ready in self.batch.deliverable(job):
            if ready.output and ready.output.size:
                self.tally.status.clear()
                output = ready.output
                pieces = marked_lines(log_text(ready.name).encode() + b"\t", output) if self.settings.tag else \
                    output.pieces()
                self.writer.add(pieces, functools.partial(self._written, output))
        self.budget.pay()
        self._pump()

    def _cancel(self, job, keep=None):
        """Ends the runs of a job but the one to keep."""
        for run in job.runs + ([job.spare] if job.spare else []):
            if run is not keep:
                self.pool.cancel(run)
                self._discard(run)
        job.runs = []
        job.spare = None

    def _discard(self, run):
        """Frees what a run holds; its errors may wait to be written."""
        if run:
            run.streams.close()
            run.source.end()

    def _written(self, spool):
        spool.clear()
        self.budget.pay()
        self.loop.call_soon_threadsafe(self._pump)

    def _pass_on_errors(self, run):
        errors, run.streams.errors = run.streams.errors, Spool(self.budget)
        if errors.size:
            self.tally.status.clear()
            self.errors.add(marked_lines(b"%d: " % run.job.number, errors), functools.partial(self._written, errors))

    def _all_is_written(self):
        """Whether all that can be written is written: if outputs have grown to their limit the first job that runs may
        go on then, or all would wait for ever."""
        return (not self.writer or self.writer.is_idle()) and self.errors.is_idle()

    # -- the end
    def _begin_no_more(self, now=False):
        """Jobs that wait for a worker are not begun; those that run end by themselves, or now."""
        self.batch.stop()
        for job in self.batch.unfinished():
            if job.state is GOING and (now or not any(run.has_begun() for run in job.runs)):
                self._cancel(job)
                self._close(job)

    def _terminate(self, number):
        if self.terminated:
            return self.loop.stop(number)
        self.terminated = number
        self._begin_no_more()
        self._maybe_over()

    def _output_failed(self, error):
        if error.errno != errno.EPIPE:
            raise LocalFailure("standard output", reason_of(error))
        self.loop.stop(signal.SIGPIPE)

    def _maybe_over(self):
        if self.batch.is_over() and self._all_is_written() and not (self.log and self.log.unsynced):
            self.loop.stop(self.terminated)

    def _tick(self):
        self.loop.call_later(PROGRESS_EVERY, self._tick)
        self.budget.pay()
        self._pump()
        if self.budget.full and not self.full:
            self.full = self.budget.full
            self.tally.say(self.full + "; jobs that write much wait for others to end")
        self.tally.show(len(self.pool.running), len(self.pool.serving()))


class MapRun(Submission):
    """One run of a job of cmap: it reads the input by itself.  It tells the Cmap of its end.  Failure where that
    cannot be."""

    def __init__(self, job, cmap):
        try:
            self.source = HeldInput(job.data, head=job.head, digest=cmap.log and cmap.log.digest(job))
        except OSError as error:
            raise input_failure(job.name, error) from None
        self.output_file = OutputFile(job.path, cmap.file_budget) if job.path else None
        streams = HeldStreams(self.source, cmap.budget, job.number, self.output_file)
        try:
            super().__init__(streams, job.names, cmap.settings.retries, lambda *ended: cmap.run_over(self, *ended[:2]),
                             timeout=cmap.settings.timeout or None)
        except Failure:
            self.source.end()
            raise
        self.job = job
        self.cmap = cmap
        self.accepts = lambda instance, address: cmap.batch.may_run(job, instance, time.monotonic())
        self.sent = None                # bytes of the input that were sent, once it is read for another reason
        self.result = None              # (status, Failure)
        self.refusal = ""               # why no worker takes it
        self.path = None                # of the file that it made

    def refused_for_good(self):
        super().refused_for_good()
        self.cmap.count_worker(self, True)

    def has_begun(self):
        """Whether a worker has it, or has just ended it."""
        return self.attempt is not None or self.sent is not None

    def began_at(self):
        """When it started on its worker, monotonic seconds; None while it waits."""
        return self.attempt.offered if self.attempt and self.attempt.is_running() else None


def cmap(arguments, settings):
    """cmap [OPTION...] APP[.pub] [FILE...]"""
    if not arguments:
        raise Failure("no key given", "", "usage: cmap [OPTION...] APP[.pub] [FILE...]", EXIT_USAGE)
    check_map_inputs(settings, arguments[1:])
    if not is_open(1) and not settings.out:
        raise Failure("standard output", os.strerror(errno.EBADF), status=EXIT_USAGE)
    park_standard()
    key, warning = load_key(arguments[0], "public")
    if warning:
        say(CMAP, warning)
    raise_descriptor_limit(4096)
    run = Cmap(key, settings, arguments[1:])
    try:
        number = run.run()
    except LocalFailure as failure:
        failure.hint = failure.hint or run.tally.done and run.tally.interrupted()
        raise
    if number == signal.SIGPIPE:
        return 128 + number
    if number:
        say(CMAP, run.tally.interrupted())
        die_of(number)
    if not settings.quiet and not settings.dry_run and has_room():
        say(CMAP, run.tally.summary(run.batch.workers))
    if run.tally.trouble:
        job, failure = run.tally.trouble
        raise Failure("input %d (%s) was the first that the cluster failed" % (job.number, log_text(job.name)[:200]),
                      failure, failure.hint)
    return EXIT_SOME_FAILED if run.tally.failed else 0


def check_map_inputs(settings, operands):
    """What cannot be meant so is refused before anything begins."""
    kinds = [word for word, given in (("--from", settings.list), ("--lines", settings.lines),
                                      ("--block", settings.block), ("--value", settings.value)) if given]
    blocks, reads_standard = settings.block or settings.cut_before, settings.cut_before and not settings.block
    kinds += ["--cut-before"] * bool(reads_standard)
    out = settings.out.replace("{/.}", "{}").replace("{/}", "{}").replace("{.}", "{}").replace("{#}", "{}")
    for wrong, what, why, hint in (
            (len(kinds) > 1, " and ".join(kinds), "only one of them at a time", ""),
            (operands and set(kinds) & {"--from", "--block", "--cut-before"}, "FILE",
             "not together with " + "".join(kinds), ""),
            (not operands and not kinds, "no input", "", "name FILEs, or use --from, --lines, --block or --value"),
            (settings.value and not is_name(os.fsencode(settings.value)), "--value=" + settings.value, "not a NAME",
             "the job finds the line in its environment as PEER_NAME, so " + NAME_RULE),
            (not is_open(0) and (settings.list == "-" or blocks or not operands and (settings.lines or settings.value)),
             "standard input", os.strerror(errno.EBADF), "the inputs come from there: it has to be open"),
            (settings.count and not settings.lines, "-N", "it says how many of --lines go together", ""),
            (settings.header and not (settings.lines or blocks), "--header", "only with --lines or --block", ""),
            (settings.cut_before and settings.cut == "bytes", "--cut-before", "not together with --cut=bytes", ""),
            (settings.out and "{}" not in out, "--out=" + settings.out, "every job would write the same file",
             "use one of {} {.} {/} {/.} {#} in it"),
            (settings.tag and settings.out, "--tag", "not together with --out",
             "it marks the lines of standard output"),
            (settings.keep_failed and not settings.out, "--keep-failed", "there is no --out to put them beside", ""),
            (settings.list not in (None, "", "-") and not os.path.exists(settings.list),
             "--from=%s" % settings.list, "there is no such file", "it has the names of the inputs, one a line"),
            (settings.resume and not settings.log, "--resume", "there is no --log that tells what is done", ""),
            (settings.resume and not settings.out, "--resume", "the outputs of the jobs that are left out would be "
             "missing on standard output", "use it with --out")):
        if wrong:
            raise Failure(what, why, hint, EXIT_USAGE)


# ---------------------------------------------------------------- cservice: the daemon
#
# One process that hears and decides.  Offers calls submitters back, Handlers forks a process for each that says GO,
# Receiver, RollCalls and AlertJudge act on datagrams, Veto and CommandWatch keep the worker from answering, Drain ends
# it.  The slots, and so all that is known of jobs, are the Responder's; handlers report their events by a Link.

OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)    # nobody else's fault


class SubmitterConnection:
    """A connection to a submitter, to which it says a worker's preamble, and then waits for GO: a worker's own, or of a
    cproxy.  It ends with on_go(socket, bytes) when as many have come as GO has, of `most` that are read; the socket is
    theirs then; with on_no_go(errno or 0); or by close()."""
    CONNECT = 5.0           # seconds to connect
    GO = 15.0               # seconds to be told to go ahead or away

    def __init__(self, loop, address, preamble, on_connected, on_go, on_no_go, most=GO_SIZE):
        self.loop, self.preamble, self.most = loop, preamble, most
        self.on_connected, self.on_go, self.on_no_go = on_connected, on_go, on_no_go
        self.go = b""
        self.socket = self.timer = None
        self.connector = Connector(loop, address, self.CONNECT, self._connected, self._end)

    def _connected(self, connection):
        self.socket = connection
        self.timer = self.loop.call_later(self.GO, self._end)
        self.on_connected()
        try:
            connection.send(self.preamble)
        except OSError as error:
            return self._end(error.errno)
        self.loop.watch(connection.fileno(), read=self._read_go)

    def _read_go(self):
        try:
            self.go = receive_up_to(self.socket, self.go, self.most)
        except (OSError, EOFError):
            return self._end()
        if len(self.go) >= GO_SIZE:
            self._release()
            connection, self.socket = self.socket, None
            self.on_go(connection, self.go)

    def _end(self, problem=0):
        self.close()
        self.on_no_go(problem)

    def _release(self):
        self.connector.close()
        if self.socket:
            self.timer.cancel()
            self.loop.watch(self.socket.fileno())

    def close(self):
        """Gives up what it holds, and tells nobody.  May be called again."""
        self._release()
        if self.socket:
            self.socket.close()


class Offers:
    """The worker's slots on offer: calls back whom the Responder picks.  The Daemon makes it."""

    def __init__(self, daemon):
        self.daemon, self.loop, self.responder, self.log = daemon, daemon.loop, daemon.responder, daemon.log
        self.connections = {}           # {Slot: SubmitterConnection}
        self.timer = NO_TIMER

    def consider(self):
        """Asks the rule what is due, does it, and comes back when it wants to be asked again."""
        self.timer.cancel()
        for slot in self.responder.due(time.monotonic()):
            self._offer(slot)
        for slot in self.responder.surplus(time.monotonic()):
            self.withdraw(slot)
        for search in self.responder.busy_due(time.monotonic()):
            self.daemon.roll_calls.send_here(search.nonce, search.origin.source)
            if search.wants_proof:
                self._offer(self.responder.show(time.monotonic(), search))
        due = self.responder.next_due()
        if due is not None:
            self.timer = self.loop.call_at(due, self.consider)

    def _offer(self, slot):
        preamble = encode_preamble(self.daemon.key.udp, slot.answer, os.urandom(8))
        self.connections[slot] = SubmitterConnection(
            self.loop, slot.origin.address, preamble, lambda: self.responder.connected(time.monotonic(), slot),
            functools.partial(self._on_go, slot, preamble), functools.partial(self._on_no_go, slot))

    def _on_go(self, slot, preamble, connection, go):
        """The submitter wants this worker, if it proves itself.  Where the last slot has become another's meanwhile, it
        learns that from the end of the connection before the first byte of TLS, or behind the proof that it has asked
        for."""
        secret = self.daemon.key.udp
        if hmac.compare_digest(go, encode_go(secret, preamble, wanted=False)):
            self.responder.turned_away(slot)
        if not hmac.compare_digest(go, encode_go(secret, preamble)):
            connection.close()
            return self._on_no_go(slot, 0)
        del self.connections[slot]
        if self.responder.go(time.monotonic(), slot) or slot.search.wants_proof:
            self.daemon.handlers.start(slot, connection)
        else:
            connection.close()
        self.consider()

    def _on_no_go(self, slot, problem):
        """The submitter has taken another worker, or cannot be reached."""
        del self.connections[slot]
        # One whose job has been taken refuses too; one that refuses again is still looking.
        again = problem == errno.ECONNREFUSED and self.responder.refused(slot)
        self.responder.move(time.monotonic(), slot, SlotEvent.LEAVE)
        if problem in OUT_OF_RESOURCES:
            self.log.note("connect", "no connection to a submitter: %s" % os.strerror(problem))
        elif problem and (again or problem != errno.ECONNREFUSED):
            self._unreachable(slot, os.strerror(problem))
        self.consider()

    def _unreachable(self, slot, words):
        """Tells both sides: the submitter waits and does not know why."""
        address = slot.origin.address
        self.log.note(address[0], "no connection back to %s: %s; does a firewall there let TCP in?" % (
            address_text(address), words))
        self.daemon.roll_calls.send_here(slot.search.nonce, slot.origin.source, address, words)

    def withdraw(self, slot):
        """Takes back what nobody has said GO to."""
        self.connections.pop(slot).close()
        self.responder.move(time.monotonic(), slot, SlotEvent.LEAVE)

    def look(self):
        """A fault in a callback must not keep an offer for ever."""
        oldest = time.monotonic() - SubmitterConnection.CONNECT - SubmitterConnection.GO - 1
        for slot in [slot for slot in self.connections if slot.since < oldest]:
            self.withdraw(slot)


class Link:
    """One end of the line between daemon and handler.  heard(event, text) gets each message, and ("END", "") once, at
    the end.  What the other end does not take at once waits here.  pause: seconds between two looks at what comes, so
    that a thousand jobs a second cost a hundred wake-ups; read() looks at once."""

    def __init__(self, loop, end, heard, pause=0.0):
        self.loop, self.end, self.heard, self.pause = loop, end, heard, pause
        self.incoming, self.unsent = b"", b""
        self.open = True
        self.pausing = False
        end.setblocking(False)
        self._watch()

    def _watch(self):
        if self.open:
            self.loop.watch(self.end.fileno(), read=None if self.pausing else self._readable,
                            write=self._flush if self.unsent else None)

    def _readable(self):
        self.pausing = self.pause > 0
        if self.pausing:
            self._watch()
            self.loop.call_later(self.pause, self._look_again)
        self.read()

    def _look_again(self):
        self.pausing = False
        self._watch()

    def send(self, event, text=""):
        """The text may be what a peer has said: no control character of that ends a line."""
        self.unsent += printable("%s %s" % (event, text) if text else event).encode("utf-8") + b"\n"
        self._flush()

    def _flush(self):
        try:
            while self.open and self.unsent:
                self.unsent = self.unsent[self.end.send(self.unsent):]
        except BlockingIOError:
            pass
        except OSError:
            self.unsent = b""       # it is about to end
        self._watch()

    def read(self):
        """Passes on what has come so far."""
        while self.open:
            try:
                data = self.end.recv(1 << 16)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            *lines, self.incoming = (self.incoming + data).split(b"\n")
            try:
                for line in lines:
                    event, _, text = line.decode("utf-8").partition(" ")
                    self.heard(event, text)
            except Exception:
                self.close()        # what was lost of it would be missed
                raise
            if not data:
                self.close()
                self.heard("END", "")

    def close(self):
        if self.open:
            self.open = False
            self.loop.watch(self.end.fileno())
            self.end.close()


class Children:
    """The processes that the daemon has started itself.  add(pid, ended): ended(wait status) is called once.  One that
    is stopped is killed: a job, whose user it has, must not keep a slot so for ever."""

    def __init__(self):
        self.ended = {}         # {pid: what to call}
        self.own = OwnChildren()

    def add(self, pid, ended):
        self.ended[pid] = ended

    def reap(self):
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED)
            except ChildProcessError:
                return
            if not pid:
                return
            if os.WIFSTOPPED(status):
                if pid in self.ended:
                    signal_process(pid, signal.SIGKILL)
            elif pid in self.ended:
                self.ended.pop(pid)(status)

    def orphans(self):
        """Those that came from handlers that have ended (Linux)."""
        return [pid for pid in self.own.pids() if pid not in self.ended]


class HandlerProcess:
    """What the daemon knows of one handler beside its slot."""

    def __init__(self, pid, slot):
        self.pid = pid
        self.slot = slot
        self.link = None
        self.group = 0              # of the job in hand, or the last one
        self.told_to_leave = False
        self.resting = False        # its job is an interpreter without a call

    def tell(self, leave):
        if leave != self.told_to_leave:
            self.told_to_leave = leave
            self.link.send((SlotEvent.LEAVE if leave else SlotEvent.STAY).name)


class Handlers:
    """The processes that serve submitters, and what they report.  The Daemon makes it."""
    PAUSE = 0.01            # seconds between two looks at what a handler reports; its end is seen at once
    LINGERING = 64          # handlers without a slot: submitters have not taken the last words, or the proof, yet

    def __init__(self, daemon):
        self.daemon, self.loop, self.responder, self.log = daemon, daemon.loop, daemon.responder, daemon.log
        self.processes = {}         # {pid: HandlerProcess}, the oldest first
        self.jobs_done = 0

    def start(self, slot, connection):
        """A process of its own goes on with a connection whose submitter has said GO."""
        try:
            ours, far = socket.socketpair()
            pid = os.fork()
        except OSError as error:
            self.log("no process for a job from %s: %s" % (slot.origin.address[0], fork_reason(error)))
            connection.close()
            if slot.state is not SlotState.FREE:
                self.responder.move(time.monotonic(), slot, SlotEvent.LEAVE)
            return
        if pid == 0:
            self._become_handler(connection, far, slot)
        handler = self.processes[pid] = HandlerProcess(pid, slot)
        self.daemon.children.add(pid, lambda status: self._ended(handler))
        far.close()
        connection.close()
        handler.link = Link(self.loop, ours, functools.partial(self._heard, handler), self.PAUSE)
        self._limit_lingering()

    def _become_handler(self, connection, link, slot):
        """In the forked child: serves the connection and ends.  Nothing here may raise or return."""
        status = 1
        try:
            os.setsid()         # a Ctrl-C at the daemon's terminal is for the daemon
            self.loop.close()
            kept = connection.fileno(), link.fileno(), self.daemon.program
            close_strays(*[fd for fd in kept if fd is not None])
            status = Handler(self.daemon, connection, link, slot).run()
        except BaseException as error:
            self.log.fault(error)
        finally:
            os._exit(status)

    def read(self):
        """Looks at once at what all handlers report."""
        for handler in list(self.processes.values()):
            handler.link.read()

    def _heard(self, handler, event, text):
        """The events are listed at Handler."""
        if event == "LINE":
            self.log(text)
        elif event == "JOB":
            id, submitter, user = text.split(" ", 2)
            self.responder.start(time.monotonic(), handler.slot, SlotJob(id, submitter, user, time.monotonic()))
            self.daemon.alerts.served(id)
        elif event == "GROUP":
            handler.group = int(text)
        elif event in ("REST", "WORK"):
            handler.resting = event == "REST"
        elif event == "EXIT":
            self.jobs_done += 1
            handler.resting = False
            self._moved(handler, SlotEvent.EXIT)
        elif event == "FAILED":
            self.daemon.alerts.forget(handler.slot.job.id)      # that it ends well elsewhere is no credit to this one
            self.daemon.command_watch.look_after_failure()
            self._moved(handler, SlotEvent.EXIT)
        elif event == "AWAY":
            self.responder.turned_away(handler.slot)
        elif event in ("LEAVE", "STAY"):
            self._moved(handler, SlotEvent[event])

    def resting(self):
        """How many slots have an interpreter without a call, which gives way to whoever else waits."""
        return sum(each.resting and each.slot.state in WITH_JOB for each in self.processes.values())

    def _moved(self, handler, event):
        self.responder.move(time.monotonic(), handler.slot, event)
        if handler.slot.state is SlotState.FREE:
            self._limit_lingering()
            self.daemon.changed()
        else:
            self.daemon.drain.look()

    def _limit_lingering(self):
        lingering = [each for each in self.processes.values() if each.slot.state is SlotState.FREE]
        if len(lingering) > self.LINGERING:
            signal_process(lingering[0].pid, signal.SIGKILL)

    def _ended(self, handler):
        """Its job has ended with it, unless it was killed."""
        handler.link.read()
        handler.link.close()
        del self.processes[handler.pid]
        slot = handler.slot
        if slot.state is not SlotState.FREE:
            self.responder.move(time.monotonic(), slot, SlotEvent.LEAVE)
        if slot.state is SlotState.LEAVING:
            self.log("job %s: its handler was killed; the job ends" % slot.job.id)
            self.daemon.orphans.add(handler)
        self.daemon.changed()

    def look(self):
        """A fault in a callback must not keep a slot for ever."""
        for handler in list(self.processes.values()):
            if handler.pid not in self.daemon.children.ended:
                self._ended(handler)
        owned = {handler.slot for handler in self.processes.values()}
        owned.update((handler.slot for handler in self.daemon.orphans.handlers), self.daemon.offers.connections)
        for slot in [each for each in self.responder.slots if each not in owned]:
            self.responder.move(time.monotonic(), slot, SlotEvent.LEAVE)
            if slot.state is SlotState.LEAVING:
                self.responder.move(time.monotonic(), slot, SlotEvent.EXIT)

    def take_turns(self):
        """Whose submitter has had its turn takes no more jobs of it, while others wait that have less; nobody does when
        the worker takes no more jobs at all."""
        over = () if self.responder.stopped else self.responder.turns_over(time.monotonic())
        for handler in self.processes.values():
            if handler.slot.state is not SlotState.FREE:
                handler.tell(self.responder.stopped or handler.slot in over)


class Orphans:
    """What handlers that were killed have left behind: it is ended, and only then their slots are free.

    On Linux the daemon inherits it, and signals nobody but its own children; elsewhere it signals the jobs' groups, as
    long as there is one of that number."""

    def __init__(self, daemon):
        self.daemon = daemon
        self.handlers = []          # HandlerProcesses
        self.killing = None         # a JobKill

    def add(self, handler):
        self.handlers.append(handler)
        self.look()

    def look(self):
        """To be called often: whatever is there is ended."""
        if self.killing is None:
            if not self.handlers and not self._left():
                return
            self.killing = JobKill(self._left)
        if not self.killing.look():
            self.daemon.loop.call_later(KILL_LOOK, self.look)
            return
        self.killing = None
        handlers, self.handlers = self.handlers, []
        for handler in handlers:
            self.daemon.responder.move(time.monotonic(), handler.slot, SlotEvent.EXIT)
        self.daemon.sweep_scratch()         # theirs, and what was just being removed
        self.daemon.changed()

    def _left(self):
        if LINUX:
            return self.daemon.children.orphans()
        return [each.group for each in self.handlers if each.group and signal_group(each.group, 0)]


class Receiver:
    """Hears the group and gives each authentic datagram to the part that it concerns.  The Daemon makes it."""

    def __init__(self, daemon):
        self.daemon, self.key, self.log = daemon, daemon.key, daemon.log
        self.responder = daemon.responder

    def read(self):
        changed = False
        for data, source, _ in self.daemon.group.datagrams():
            changed = self.datagram(data, source) or changed
        if changed:
            self.daemon.changed()

    def datagram(self, data, source):
        """Acts on one datagram; returns whether it was worth anything."""
        try:
            datagram = parse_datagram(data)
            if datagram.key_id == self.key.id and self._matters(datagram) and datagram.authentic(self.key.udp):
                self._act(datagram, source)
                return True
            if datagram.kind == ASK and datagram.key_id != self.key.id and parse_ask(datagram)[1] & CHECK:
                self.daemon.roll_calls.show_up(datagram.nonce, source)
        except ProtocolError as error:
            if speaks_another_version(data):
                self.log.note("version", "from %s: %s" % (source[0], error))
                if data[5:6] == bytes([ASK]):
                    self.daemon.roll_calls.show_up(bytes(8), source)
        return False

    def _matters(self, datagram):
        """Most of what a worker hears is about jobs of others, and not worth an HMAC."""
        if datagram.kind == ALERT:
            self.daemon.handlers.read()     # an alert may be faster than the word of a job that was over at once
            return any(self.daemon.alerts.counts(alert) for alert in parse_alerts(datagram))
        return datagram.kind != HERE and self.responder.concerned(datagram.kind, datagram.nonce)

    def _act(self, datagram, source):
        kind, nonce = datagram.kind, datagram.nonce
        if kind == ANNOUNCE and not self.daemon.drain.began:
            self.responder.announced(time.monotonic(), nonce, source, parse_announcement(datagram), datagram.sequence,
                                     datagram.port)
        elif kind == HOLD:
            self.responder.hold(time.monotonic(), nonce, parse_hold(datagram), datagram.sequence)
        elif kind == TAKEN:
            self.responder.taken(time.monotonic(), nonce, parse_taken(datagram))
        elif kind == ALERT:
            for alert in parse_alerts(datagram):
                self.daemon.alerts.heard(alert)
        elif kind == ASK:
            self.daemon.roll_calls.asked(datagram, source)


class AlertJudge:
    """Which alerts make this worker hold back: only one about a job that it has really had counts, and each job's first
    one only, so that no copy begins or ends anything."""
    MUTE = 10.0             # seconds that a ratted out worker holds back
    REMEMBERED = 2048       # jobs that an alert may still speak of

    def __init__(self, responder, log):
        self.responder, self.log = responder, log
        self.jobs = Recent(self.REMEMBERED)     # {id: True} of those without an alert so far

    def served(self, job):
        self.jobs[job] = True

    def forget(self, job):
        self.jobs.pop(job, None)

    def counts(self, alert):
        return alert.job in self.jobs and alert.words != "test"

    def heard(self, alert):
        if not self.counts(alert):
            return
        self.forget(alert.job)
        ratted = alert.verdict == RATTED_OUT
        self.responder.penalise(time.monotonic(), self.MUTE if ratted else 0)
        if ratted:
            self.log("reported by %s: %s; holds back for %d s" % (alert.submitter, alert.words, self.MUTE))


class RollCalls:
    """Answers who asks how this worker is, and who is to hear that it is busy or cannot connect."""
    RATE = 20               # answers to roll calls and announcements a second
    TESTS_MAX = 16          # roll calls that it tries to connect back to at once, and in a second

    def __init__(self, daemon):
        self.daemon, self.loop, self.key, self.group = daemon, daemon.loop, daemon.key, daemon.group
        self.bucket = TokenBucket(self.RATE, self.RATE)
        self.stranger_bucket = TokenBucket(1, 1)    # answers to roll calls of other keys
        self.test_bucket = TokenBucket(self.TESTS_MAX, self.TESTS_MAX)
        self.tests = {}                             # {nonce: Connector}
        self.answers = collections.OrderedDict()    # {nonce of a roll call: (its last sequence number, Timer)}
        self.sequence = 0

    def show_up(self, nonce, source):
        """A check of another key or version learns that somebody is there."""
        if self.stranger_bucket.take(time.monotonic()):
            self.group.send_to(encode_datagram(self.key.udp, HERE, self.key.id, nonce, 0), source)

    def asked(self, datagram, source):
        """Answers after a random part of the spread, and connects first if that is wanted."""
        spread, flags, heard = parse_ask(datagram)
        nonce, now = datagram.nonce, time.monotonic()
        last, timer = self.answers.get(nonce, (-1, None))
        if datagram.sequence <= last or is_heard(heard, nonce, datagram.sequence, self.daemon.instance):
            return          # a copy may claim to come from anywhere
        if flags & CHECK:
            self.daemon.command_watch.look_now()
        answer = functools.partial(self.send_here, nonce, source, jobs=bool(flags & ASK_JOBS))
        if flags & CONNECT and datagram.port >= PORT_LEAST:
            if last >= 0 or not self.test_bucket.take(now):
                return
            answer = functools.partial(self._test, nonce, Origin(source, datagram.port))
        if timer:
            timer.cancel()
        self.answers[nonce] = datagram.sequence, self.loop.call_later(uniform() * spread, answer)
        self.answers.move_to_end(nonce)
        if len(self.answers) > ANSWERED_MOST:
            self.answers.popitem(last=False)[1][1].cancel()

    def _test(self, nonce, origin):
        """Tries whether this worker can connect to who asks."""
        if len(self.tests) < self.TESTS_MAX:
            self.tests[nonce] = Connector(self.loop, origin.address, SubmitterConnection.CONNECT,
                                          functools.partial(self._connected, nonce, origin),
                                          functools.partial(self._tested, nonce, origin))

    def _connected(self, nonce, origin, connection):
        try:
            connection.send(encode_preamble(self.key.udp, Answer(nonce, 0, 0, 0, False), os.urandom(8)))
        except OSError:
            pass        # it shows who has connected, where nothing else may
        connection.close()
        self._tested(nonce, origin, 0)

    def _tested(self, nonce, origin, problem):
        del self.tests[nonce]
        self.send_here(nonce, origin.source, origin.address, os.strerror(problem) if problem else "")

    def send_here(self, nonce, address, back=("", 0), error="", jobs=False):
        """Tells who asked how this worker is; back: where it has tried to connect to; error: why that failed.  Where
        there is no way to who asked, all who hear the group are told."""
        if not self.bucket.take(time.monotonic()):
            return
        self.sequence += 1
        resting = self.daemon.handlers.resting() if nonce in self.answers else 0
        here = encode_here(self.daemon.here(address, back, error, jobs, resting))
        data = encode_datagram(self.key.udp, HERE, self.key.id, nonce, self.sequence, here)
        if not self.group.send_to(data, address):
            self.group.send(data)


class CommandWatch:
    """Whether COMMAND is there: while it is missing nobody is answered, who would only be refused."""

    def __init__(self, daemon):
        self.daemon = daemon
        self.missing = ""               # what is missing, in words

    @property
    def words(self):
        """What a roll call hears of it."""
        return "COMMAND is missing" if self.missing == NOT_THERE else self.missing

    def look_after_failure(self):
        """A job could not be started: where COMMAND is there, others go first."""
        self.look_now()
        if not self.missing:
            self.daemon.responder.penalise(time.monotonic(), AlertJudge.MUTE)

    def look(self):
        if self.missing:
            self.look_now()

    def look_now(self):
        path, before = self.daemon.path, self.missing
        self.missing = missing_for(path)
        if self.missing != before:
            self.daemon.log("%s: %s" % (path, "%s, no new jobs until it is there" % self.missing if self.missing else
                                        "there again, takes jobs again"))
            self.daemon.changed()


class Veto:
    """The owner's word by --if: while the command ends with another status than 0, or hangs, no job is taken.  The
    Daemon makes it."""
    EVERY = 10.0            # seconds between two runs

    def __init__(self, daemon):
        self.daemon = daemon
        self.command = daemon.settings.veto
        self.status = None if self.command else 0       # as the last one ended; None until the first one has
        self.pid = None                                 # of the running command
        self.began = -math.inf

    @property
    def words(self):
        """Why no job is taken; "" where one is, or nothing is known yet."""
        if not self.status:
            return ""
        return "--if ended " + ("by %s" % signal.Signals(os.WTERMSIG(self.status)).name
                                if os.WIFSIGNALED(self.status) else "with %d" % os.WEXITSTATUS(self.status))

    def look(self):
        if not self.command or time.monotonic() - self.began < self.EVERY:
            return
        if self.pid:        # it hangs: that is no yes
            return signal_process(-self.pid, signal.SIGKILL)
        self.began = time.monotonic()
        try:
            null = [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)]
            self.pid = os.posix_spawn("/bin/sh", ["sh", "-c", self.command], os.environ, file_actions=null,
                                      setpgroup=0, setsigdef=RESETTABLE)
        except (OSError, AttributeError) as error:
            return self.daemon.log.note("veto", "--if: %s" % reason_of(error))
        self.daemon.children.add(self.pid, self._ended)

    def _ended(self, status):
        before, self.status, self.pid = self.status, status, None
        if before is None:
            self.daemon.say_ready()
        if status and not before:
            self.daemon.log("--if: no new jobs for the time being (%s)" % self.words)
        elif before and not status:
            self.daemon.log("--if: takes jobs again")
        self.daemon.changed()

    def end(self):
        if self.pid:
            signal_process(-self.pid, signal.SIGKILL)


class Drain:
    """The end of a worker: after the first signal no job starts and none is killed, after the second all are.  The
    Daemon makes it.

    Handlers are told by their links and answer, so that what is logged is true: whoever has answered LEAVE starts no
    job any more."""
    PATIENCE = 2.0          # seconds that a handler may take for its answer before the line is logged without it

    def __init__(self, daemon):
        self.daemon = daemon
        self.began = None           # monotonic seconds
        self.asked_by = None        # a signal's name, or --stop, until the line about it is logged

    def on_signal(self, number):
        self._ask(signal.Signals(number).name)

    def asked_to_stop(self, now):
        """By cservice --stop; returns how many jobs run."""
        self._ask("--stop")
        if now:
            self._ask("--stop")
        return sum(slot.state in WITH_JOB for slot in self.daemon.responder.slots)

    def _ask(self, by):
        if self.began is not None:
            for handler in self.daemon.handlers.processes.values():
                handler.link.send("KILL")
            return
        self.began, self.asked_by = time.monotonic(), by
        for slot in list(self.daemon.offers.connections):
            self.daemon.offers.withdraw(slot)
        self.daemon.changed()

    def look(self):
        if self.began is None:
            return
        slots = self.daemon.responder.slots
        late = time.monotonic() - self.began > self.PATIENCE
        if self.asked_by and (late or all(slot.state is SlotState.LEAVING for slot in slots)):
            name, self.asked_by = self.asked_by, None
            self.daemon.log("%s: no new jobs, %d running; again to kill them" % (
                name, sum(slot.state in WITH_JOB for slot in slots)), always=True)
        if not self.asked_by and not slots and not self.daemon.handlers.processes and not self.daemon.orphans.killing:
            self.daemon.end()


class Daemon:
    """The worker: its parts, and what they share.  cservice makes it.

    A fault in one of its callbacks costs the job or datagram in hand: it is logged, and the daemon serves on.
    """
    LOOK = 0.5              # seconds between two looks at waiting submitters and turns
    SAMPLE = 1.0            # and at the load

    def __init__(self, key, settings, command, log, unit="", program=None):
        self.loop = Loop(on_error=log.fault)
        self.program = program          # under --python: a descriptor of this program, for interpreters to run
        self.key = key
        self.settings = settings
        self.command = command
        self.log = log
        self.path = find_command(command[0])
        self.environment = job_environment(settings.user)
        self.scratch = scratch_place(key) if settings.scratch else None
        self.folder = os.getcwd() if settings.scratch else None
        if program is not None:
            share = b"%d" % max(1, usable_cpus() // settings.concurrency)
            for name in THREAD_VARIABLES:
                self.environment.setdefault(name.encode(), share)
        self.context = tls_context(key, server_side=False)
        self.group = GroupSocket(settings.group, listen=True)
        self.instance = os.urandom(8).hex()
        self.began = time.monotonic()
        self.meter = LoadMeter()
        self.responder = Responder(settings.concurrency, usable_cpus(), measured_speed(), uniform, settings.boost)
        self.children = Children()
        self.offers = Offers(self)
        self.handlers = Handlers(self)
        self.orphans = Orphans(self)
        self.alerts = AlertJudge(self.responder, log)
        self.roll_calls = RollCalls(self)
        self.receiver = Receiver(self)
        self.command_watch = CommandWatch(self)
        self.veto = Veto(self)
        self.drain = Drain(self)
        self.control = ControlSocket(self.loop, key, self.instance, unit, self.drain.asked_to_stop)

    def run(self):
        """Serves until told to stop; returns 0."""
        loop = self.loop
        loop.on_signal(signal.SIGCHLD, lambda number: self.reap())
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.on_signal_unless_ignored(number, self.drain.on_signal)
        loop.on_signal(signal.SIGHUP, lambda number: None)
        loop.watch(self.group.fileno(), read=self.receiver.read)
        loop.call_every(self.LOOK, self.look)
        loop.call_every(self.SAMPLE, self.sample)
        loop.call_every(REFRESH_EVERY, self.group.refresh)
        self.sweep_scratch()
        self.changed()
        self.veto.look()
        if self.veto.status is not None:
            self.say_ready()
        return loop.run()

    def say_ready(self):
        user, interfaces = self.settings.user, self.group.heard_on()
        self.log("ready: key %s, group %s%s, %s, command %s%s" % (
            self.key.fingerprint, self.settings.group, " on " + " ".join(interfaces) if interfaces else "",
            count_text(self.settings.concurrency, "slot"), self.path, ", jobs run as " + user.pw_name if user else ""),
            always=True)
        if self.group.advice():
            self.log("warning: nobody on another machine is heard: %s" % self.group.advice(), always=True)
        if os.geteuid() == 0 and not user:
            self.log("warning: jobs run as root; --user NAME gives them another user's rights", always=True)
        if self.program is not None and can_read(self.key.name, user):
            self.log("warning: calls can read %s, so who has its .pub can have it as well; --user NAME prevents it" %
                     self.key.name, always=True)
        for words in neighbour_warnings(self.key, self.group, self.control):
            self.log("warning: " + words, always=True)
        self.log.settle()

    def sweep_scratch(self):
        """Removes the folders of jobs whose handler was killed, now or in an earlier life."""
        if self.scratch:
            try:
                pid = call_as(self.settings.user, lambda: sweep_scratch(*self.scratch, self.log))
                self.children.add(pid, lambda status: None)
            except OSError as error:
                self.log("no process to remove old folders: %s" % fork_reason(error))

    def changed(self):
        """Something has changed that slots, turns or the end may depend on."""
        self.responder.stopped = self.drain.began is not None or self.veto.status != 0 or bool(
            self.command_watch.missing)
        self.offers.consider()
        self.handlers.take_turns()
        self.drain.look()

    def look(self):
        """What is looked at from time to time, whatever the calls have missed."""
        self.reap()
        self.offers.look()
        self.handlers.look()
        self.command_watch.look()
        self.veto.look()
        self.changed()

    def sample(self):
        self.responder.load(time.monotonic(), self.meter.read(self.responder.taken_slots()))

    def reap(self):
        self.children.reap()
        self.orphans.look()

    def here(self, address, back, error, jobs, resting):
        """This worker as a Here, for who asks from this address.  resting: slots that count as free."""
        responder, now = self.responder, time.monotonic()
        running = responder.taken_slots() - resting
        state = (UNREACHABLE if error else DRAINING if self.drain.began is not None else
                 UNABLE if self.command_watch.missing else VETOED if self.veto.status != 0 else
                 BUSY if running >= responder.most else FREE)
        now_running = tuple(RunningNow(now - slot.job.began, slot.job.id, slot.job.submitter, slot.job.user)
                            for slot in responder.slots if slot.state in WITH_JOB) if jobs else ()
        return Here(state, responder.most, running, responder.waiting(), responder.cores, responder.outside,
                    responder.cost(now), responder.speed, int(now - self.began), self.handlers.jobs_done, back[1],
                    address_towards(address), self.instance, socket.gethostname(), VERSION,
                    "%d.%d.%d" % sys.version_info[:3], self.command_digest(), os.path.basename(self.path),
                    error or self.command_watch.words or self.veto.words, back[0], now_running, 0)

    def command_digest(self):
        """The same for workers with the same command and arguments, wherever it is installed."""
        words = [os.path.basename(self.command[0])] + self.command[1:]
        return hashlib.sha256("\0".join(words).encode("utf-8", "surrogateescape")).hexdigest()[:16]

    def end(self):
        self.veto.end()
        self.log("done", always=True)
        self.control.end()
        self.loop.stop(0)


def job_environment(user):
    """What every job finds, as bytes: this process's environment, and with --user that user's own places."""
    environment = {name: value for name, value in os.environb.items()
                   if not name.startswith(b"PEER_") and name != b"JOURNAL_STREAM"}
    if user:
        environment.update({
            b"HOME": os.fsencode(user.pw_dir), b"SHELL": os.fsencode(user.pw_shell or "/bin/sh"),
            b"USER": os.fsencode(user.pw_name), b"LOGNAME": os.fsencode(user.pw_name),
            b"PATH": b"/usr/local/bin:/usr/bin:/bin"})
    return environment


class LoadMeter:
    """How many processes have wanted a CPU since the last look, the own jobs left out.

    Up to the number of CPUs it is the time that they were busy, which no sampling misses; what waits beyond that shows
    only in the run queue of the moment.  Both from /proc (Linux); elsewhere the one minute load average.
    """

    def __init__(self):
        self.cpus = os.cpu_count() or 1
        self.ticks = 0, 0           # of busy CPUs and of all, so far
        self.read(0)

    def read(self, jobs):
        """jobs: how many of the own ones run."""
        try:
            ticks = [int(word) for word in read_lines("/proc/stat")[0].split()[1:9]]
            queue = int(read_lines("/proc/loadavg")[0].split()[3].partition("/")[0]) - 1    # less this very process
            busy, total = sum(ticks) - ticks[3] - ticks[4], sum(ticks)  # less idle, and idle with a disk to wait for
        except (ValueError, IndexError):
            try:
                return max(0.0, os.getloadavg()[0] - jobs)
            except OSError:
                return 0.0
        used, passed = busy - self.ticks[0], total - self.ticks[1]
        self.ticks = busy, total
        return (max(0.0, self.cpus * used / passed - jobs) if passed > 0 else 0.0) + max(0, queue - self.cpus - jobs)


NOT_THERE = "missing or not executable"


def missing_for(path):
    """What a program at this path is missing to run, in words; "" where nothing is."""
    if not can_execute(path):
        return NOT_THERE
    try:
        with open(path, "rb") as file:
            head = file.read(256)
    except OSError:
        return ""           # it may be run without being read
    words = os.fsdecode(head.partition(b"\n")[0][2:]).split() if head[:2] == b"#!" else []
    interpreters = words[:1]
    if words and os.path.basename(words[0]) == "env":
        interpreters += [word for word in words[2 if words[1:2] == ["-S"] else 1:][:1]
                         if word[0] != "-" and "=" not in word]
    for name in interpreters:
        if not any(map(can_execute, places_of(name))):
            return "its interpreter %s is missing" % name
    return ""


def can_execute(path):
    return os.path.isfile(path) and os.access(path, os.X_OK)


def places_of(name):
    """The paths at which a shell looks for a command."""
    return [name] if "/" in name else [
        os.path.join(folder or ".", name) for folder in os.environ.get("PATH", os.defpath).split(os.pathsep)]


def find_command(name):
    """The path of an executable file, as a shell would find it; Failure where it cannot run."""
    there = list(filter(os.path.isfile, places_of(name)))
    path = next(filter(can_execute, there), None)
    missing = missing_for(path) if path else ""
    if missing:
        raise Failure(name, missing, "install it, or mend the first line of " + path, EXIT_USAGE)
    if path:
        return os.path.abspath(path)
    found = there and there[0]
    raise Failure(name or "an empty COMMAND", "not executable: %s" % found if found else "command not found",
                  "in this folder is one: name it ./" + name if "/" not in name and os.path.isfile(name) else
                  "COMMAND is a program of this machine, run without a shell", EXIT_USAGE)


# ---------------------------------------------------------------- cservice: beside its jobs
#
# What a worker needs besides announcements and handlers: a log file and a life in the background, a way to be told to
# stop, folders for its jobs, and the parameters that it takes.

LOG_MOST = 10 << 20         # bytes after which a log file becomes FILE.1


class LogFile:
    """The file for cservice's lines: beside standard error until it is ready, then in the place of it.

    cservice() makes it and Log writes to it; it lives as long as the process.  starter: with -d the pipe on which who
    started this one waits for it to be ready.
    """

    def __init__(self, path, starter=None):
        self.path = os.path.abspath(path)
        self.starter = starter
        self.fd = self._open()

    def _open(self):
        """A descriptor of it, for appending; Failure where something else stands there."""
        fd = -1
        try:
            fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
                raise OSError(errno.EPERM, "not a regular file of this user's own")
            os.fchmod(fd, 0o600)
            return fd
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            why = "it is a symbolic link" if error.errno in (errno.ELOOP, errno.EMLINK) else reason_of(error)
            raise Failure("cannot write the log %s" % self.path, why, "--log FILE names another", EXIT_USAGE) from None

    def take_over(self):
        """Nothing that was the starter's is kept from here on."""
        os.dup2(self.fd, 2)
        os.close(self.fd)
        self.fd = 2
        if self.starter is None:
            return
        for standard in 0, 1:
            park(standard)
        os.setsid()
        try:
            os.write(self.starter, b"ready")
        except OSError:
            raise Failure("the end", "who started this cservice did not wait until it was ready") from None
        os.close(self.starter)
        self.starter = None

    def has_room(self):
        """Whether a line may be written.  Who finds the file full moves it and begins a new one, be it the daemon or a
        handler; a handler that may not, since it has the rights of the jobs' user, has as much again."""
        full = os.fstat(self.fd).st_size
        if full < LOG_MOST or self.fd != 2:
            return True
        try:
            fcntl.lockf(2, fcntl.LOCK_EX | fcntl.LOCK_NB)       # closing the old file gives it back
            if os.path.exists(self.path) and os.path.samestat(os.fstat(2), os.stat(self.path)):
                os.replace(self.path, self.path + ".1")
            new = self._open()
        except (OSError, Failure):
            return full < 2 * LOG_MOST
        os.dup2(new, 2)
        os.close(new)
        return True


def default_log(key):
    """The path of the log file of a key's worker on this host, in a folder that is made if it is not there."""
    folder = os.path.expanduser(os.path.join("~", ".local", "state", "cexec"))
    try:
        os.makedirs(folder, 0o700, exist_ok=True)
    except OSError as error:
        raise Failure("cannot make the folder %s" % folder, reason_of(error), "--log FILE names another",
                      EXIT_USAGE) from None
    return os.path.join(folder, "%s-%s.log" % (socket.gethostname().replace("/", "-"), os.path.basename(key)))


def fork_to_background(log, key):
    """In a child (None, the pipe on which to say that it is ready); in the process that was started (status, None),
    once the child serves or has said why it does not."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        return None, writing
    os.close(writing)
    if os.read(reading, 5):
        say(CSERVICE, "serves in the background; log: %s; to stop it: cservice --stop %s" % (
            os.path.abspath(log), shell_word(key)))
        return 0, None
    status = os.waitpid(pid, 0)[1]
    return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status) or EXIT_TEMPORARY, None


# -- how it is told to stop

CONTROL_NAME = "cexec/%d/%s/%s"     # user, fingerprint, instance: an abstract Unix socket (Linux)
CONTROL_FOLDER = "/tmp/cexec-%d"    # elsewhere: user; the sockets in it are named by fingerprint and instance
CONTROLLERS_MAX = 16                # processes that wait for this cservice to end


def control_folder():
    """The user's folder for control sockets; OSError where somebody else's stands in its place."""
    folder = CONTROL_FOLDER % os.geteuid()
    try:
        os.mkdir(folder, 0o700)
    except FileExistsError:
        pass
    status = os.lstat(folder)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise OSError(errno.EPERM, "%s is not a folder of this user's alone" % folder)
    return folder


def control_addresses(key):
    """{address: user} of the control sockets for the key on this machine; elsewhere than on Linux, of this user's."""
    mark = key.fingerprint.partition(":")[2]
    if not LINUX:
        folder = control_folder()
        return {os.path.join(folder, name): os.geteuid() for name in os.listdir(folder) if name.startswith(mark)}
    words = [line.rpartition(" ")[2].split("/") for line in read_lines("/proc/net/unix")]
    return {"\0" + "/".join(word)[1:]: int(word[1]) for word in words
            if len(word) == 4 and word[0] == "@cexec" and whole(word[1]) and word[2] == mark}


def peer_user(connection):
    """The user whose process is at the other end of a control socket."""
    if not LINUX:
        return os.geteuid()     # nobody else gets into the folder
    return struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]


def controls(key, everyone=False, own=None):
    """Connections to the cservices of the key on this machine, this user's or everyone's, but for the own address."""
    found = []
    for address, user in control_addresses(key).items():
        if address == own or user != os.geteuid() and not everyone:
            continue
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(10)       # at once where it cannot be taken: who is stopped must not stop others
        try:
            connection.connect(address)
            if peer_user(connection) == user:
                found.append(connection)
                continue
        except ConnectionRefusedError:
            if not LINUX:
                discard(address)        # of one that was killed
        except OSError:
            pass        # it has ended meanwhile
        connection.close()
    return found


class ControlSocket:
    """Where `cservice --stop` of the same user finds this worker.  The Daemon makes it, and closes it in its handlers.

    A line asks: `stop` or `now`, and on_stop(now) is called; the answer is a line, and then the connection's end, which
    comes when the daemon has ended.  unit: the service manager's name for it, which then has to stop it.  problem: why
    nobody can find it.
    """

    def __init__(self, loop, key, instance, unit, on_stop):
        self.loop = loop
        self.unit = unit
        self.on_stop = on_stop
        self.connections = []
        self.address = self.problem = None
        self.socket = socket.socket(socket.AF_UNIX)
        mark = key.fingerprint.partition(":")[2]
        try:
            self.address = ("\0" + CONTROL_NAME % (os.geteuid(), mark, instance) if LINUX else
                            os.path.join(control_folder(), mark + instance))
            self.socket.bind(self.address)
            self.socket.listen(CONTROLLERS_MAX)
        except OSError as error:
            self.problem = reason_of(error)
            return
        self.socket.setblocking(False)
        loop.watch(self.socket.fileno(), read=self._accept)

    def _accept(self):
        try:
            connection = self.socket.accept()[0]
        except OSError:
            return
        if len(self.connections) >= CONTROLLERS_MAX or peer_user(connection) != os.geteuid():
            return connection.close()
        connection.setblocking(False)
        self.connections.append(connection)
        self.loop.watch(connection.fileno(), read=lambda: self._asked(connection))

    def _asked(self, connection):
        try:
            words = connection.recv(4096).split()
        except BlockingIOError:
            return
        except OSError:
            words = []
        if words in ([b"stop"], [b"now"]):
            answer = "unit %s" % self.unit if self.unit else "running %d" % self.on_stop(words == [b"now"])
            try:
                connection.send(answer.encode() + b"\n")
            except OSError:
                pass        # who has asked does not wait
        else:
            self.loop.watch(connection.fileno())
            self.connections.remove(connection)
            connection.close()

    def close(self):
        """In a handler, which has nothing to do with it."""
        for connection in [self.socket, *self.connections]:
            connection.close()

    def end(self):
        """In the daemon, when it is about to end: who waits learns that from the end of the process."""
        if self.address and not LINUX:
            discard(self.address)


def service_unit():
    """The name of the unit as which systemd has started this very process; empty where it has not."""
    started = os.environ.get("SYSTEMD_EXEC_PID")        # since version 248
    if started != str(os.getpid()) if started else "INVOCATION_ID" not in os.environ or os.getppid() != 1:
        return ""
    names = [line.strip().rpartition("/")[2] for line in read_lines("/proc/self/cgroup")]
    return next((name for name in names if name.endswith(".service")), "of a service manager")


def stop_services(key, now):
    """cservice --stop: tells this user's cservices of the key on this machine, and waits until they have ended."""
    found, status = controls(key), 0
    if not found:
        say(CSERVICE, "no cservice of this user serves the key %s on this machine" % key.fingerprint)
    for connection in found:
        try:
            connection.sendall(b"now" if now else b"stop")
            word, _, rest = connection.recv(1000).decode("utf-8", "replace").strip().partition(" ")
        except OSError as error:
            say(CSERVICE, "a cservice of this key does not answer: %s" % reason_of(error))
            status = EXIT_TEMPORARY
            continue
        if word == "unit":
            say(CSERVICE, "not stopped: it runs as the unit %s" % rest)
            say("", "  stop it there: systemctl stop %s" % rest)
            status = EXIT_USAGE
        elif word:
            say(CSERVICE, "takes no new job, %s running%s" % (
                rest, "" if now or rest == "0" else "; once more, or with --now, ends them"))
            wait_for(connection.fileno(), select.POLLIN)
        elif os.fsdecode(connection.getpeername()) in control_addresses(key):       # else it was ending anyhow
            say(CSERVICE, "a cservice of this key does not answer: too many ask it at once")
            status = EXIT_TEMPORARY
    return status


def neighbour_warnings(key, group_socket, control):
    """What is to be said of what keeps from this worker what is its: mostly other programs on this machine."""
    warnings = []
    if control.problem:
        warnings.append("cservice --stop does not find this one: %s" % control.problem)
    others = [] if control.problem else controls(key, everyone=True, own=control.address)
    for connection in others:
        connection.close()
    if others:
        warnings.append("another cservice of this key runs on this machine, and their slots add up")
    group = group_socket.group
    if is_one_machine(group) and udp_listeners(group) - {os.fstat(group_socket.fileno()).st_ino}:
        warnings.append("another program of this machine listens on %s, and only the one that was started last hears "
                        "what is sent there; give each a port of its own, or take a broadcast or multicast GROUP"
                        % (group,))
    if group.kind == "unicast" and not is_broadcast(group) and not is_own_address(group.address):
        warnings.append("%s is no address of this machine, so nothing that is sent there is heard here; GROUP is an "
                        "address of this machine, or a broadcast or multicast group" % group.address)
    return warnings


def is_one_machine(group):
    """Whether a group is a single address: of those that name a network's broadcast, connect knows."""
    if group.kind != "unicast":
        return False
    with socket.socket(group.family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(socket_address(group.family, group.address, group.port, group.scope))
            return True
        except OSError:
            return False


def udp_listeners(group):
    """The inodes of the UDP sockets that hear this address and port here (Linux)."""
    packed = socket.inet_pton(group.family, group.address)
    address = "".join("%08X" % word for word in struct.unpack("=%dI" % (len(packed) // 4), packed))
    places = {"%s:%04X" % (place, group.port) for place in (address, "0" * len(address))}
    rows = [line.split() for line in read_lines("/proc/net/udp6" if len(packed) > 4 else "/proc/net/udp")]
    return {int(row[9]) for row in rows if row[1] in places}


# -- the folders of --scratch

FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


def open_folder(name, parent=None):
    """Opens a folder, never by a link, once its owner has all rights to it."""
    if not LINUX:
        os.chmod(name, 0o700, dir_fd=parent, follow_symlinks=False)
        return os.open(name, FOLDER, dir_fd=parent)
    handle = os.open(name, os.O_PATH | FOLDER, dir_fd=parent)
    try:
        os.chmod("/proc/self/fd/%d" % handle, 0o700)
        return os.open("/proc/self/fd/%d" % handle, os.O_RDONLY | os.O_DIRECTORY)
    finally:
        os.close(handle)


def remove_folder(path, top):
    """Removes the folder `path`, open as `top`, and all that is in it.  Returns what hindered it first, or None.

    The folders in it are moved to its top before they are looked into: so no depth of them costs anything, and what
    is mounted there, which cannot be moved, is not entered.
    """
    problems, names = [], [""]      # the folder itself, and those that were moved into it
    try:
        os.fchmod(top, 0o700)
        while names:
            name = names.pop()
            folder = open_folder(name, top) if name else top
            for entry in list(os.scandir(folder)):
                try:
                    if entry.is_dir(follow_symlinks=False):
                        os.close(open_folder(entry.name, folder))
                        moved = "." + os.urandom(8).hex()
                        os.rename(entry.name, moved, src_dir_fd=folder, dst_dir_fd=top)
                        names.append(moved)
                    else:
                        os.unlink(entry.name, dir_fd=folder)
                except OSError as error:
                    problems.append(error)
            if name:
                os.close(folder)
                os.rmdir(name, dir_fd=top)
        if os.fstat(top).st_nlink:      # else its job has removed it
            os.rmdir(path)
    except OSError as error:
        problems.append(error)
    return problems[0] if problems else None


def scratch_place(key):
    """(where the folders of this key's jobs stand, how their names begin)."""
    return os.path.abspath(os.environ.get("TMPDIR") or "/tmp"), "cexec-job-%s-" % key.id.hex()


class Scratch:
    """An empty folder for one job, made with the job's rights.  RunningJob makes it and ends it with remove().

    Who has it keeps a lock on it: a folder without one is what a handler that was killed has left behind.
    """
    WAIT = 10.0             # seconds that a slot waits for its removal

    def __init__(self, place, prefix):
        """place: the folder for it; prefix: of its name.  OSError when it cannot be."""
        self.done = None            # what to call when it has been removed
        mask = os.umask(0o77)
        try:
            self.path, self.fd = self._make(place, prefix)
        except OSError as error:
            raise OSError(error.errno, "no folder for it in %s: %s" % (place, reason_of(error))) from None
        finally:
            os.umask(mask)

    def _make(self, place, prefix):
        for _ in range(100):
            path = os.path.join(place, prefix + os.urandom(8).hex())
            os.mkdir(path, 0o700)
            fd = -1
            try:        # another cservice's sweep may come before the lock
                fd = os.open(path, FOLDER)
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(fd), os.lstat(path)):
                    return path, fd
            except (FileNotFoundError, BlockingIOError):
                pass
            if fd >= 0:
                os.close(fd)
        raise OSError(errno.EBUSY, "%s is swept by others all the time" % place)

    def remove(self, loop, done):
        """Removes it in a child.  done(words) is called when that has ended, or after WAIT seconds; words: what is left
        and why, or empty.  When this is called again meanwhile, the last done counts."""
        going, self.done = self.done, done
        if going:
            return
        reading, writing = os.pipe()
        try:
            pid = call_as(None, lambda: self._remove(writing), self.fd, writing)
        except OSError as error:
            os.close(reading)
            return done("%s is left: %s" % (self.path, fork_reason(error)))
        finally:
            os.close(writing)
        os.close(self.fd)           # the child has the lock

        def over(late=False):
            words = "" if late else os.read(reading, 4096).decode("utf-8", "replace")
            loop.watch(reading)
            os.close(reading)
            timer.cancel()
            os.waitpid(pid, os.WNOHANG if late else 0)
            self.done("%s is not removed after %d s" % (self.path, self.WAIT) if late else words)
        timer = loop.call_later(self.WAIT, lambda: over(late=True))
        loop.watch(reading, read=over)

    def _remove(self, report):
        problem = remove_folder(self.path, self.fd)
        if problem:
            os.write(report, ("%s is left: %s" % (self.path, reason_of(problem))).encode("utf-8", "replace"))


def sweep_scratch(place, prefix, log):
    """Removes this user's folders there that nobody holds; logs each that stays."""
    try:
        names = sorted(os.listdir(place))
    except OSError as error:
        return log("cannot look for old folders in %s: %s" % (place, reason_of(error)))
    for name in names:
        path, fd = os.path.join(place, name), -1
        try:
            if not name.startswith(prefix) or os.lstat(path).st_uid != os.geteuid():
                continue
            fd = open_folder(path)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            problem = remove_folder(path, fd)
        except (BlockingIOError, FileNotFoundError):
            problem = None          # another's, who will remove it
        except OSError as error:
            problem = error
        if fd >= 0:
            os.close(fd)
        if problem:
            log("%s is left: %s" % (path, reason_of(problem)))


def make_and_remove(place, prefix):
    """OSError where no job could have a folder there."""
    scratch = Scratch(place, prefix)
    problem = remove_folder(scratch.path, scratch.fd)
    if problem:
        raise problem


# -- the parameters of --allow

def refusal_of(names, allowed):
    """Why a job with these [(name, value)] is not taken, or empty; allowed: {NAME: [pattern]}."""
    import fnmatch
    seen = set()
    for name, value in names:
        name, value = (text.decode("utf-8", "surrogateescape") for text in (name, value))
        patterns = allowed.get(name, ())
        if not patterns:
            return "the parameter %s is not allowed here, only %s" % (name, ", ".join(allowed))
        if name in seen:
            return "the parameter %s was given twice" % name
        if not any(fnmatch.fnmatchcase(value, pattern) for pattern in patterns):
            return "%s=%s is not allowed here, only %s" % (
                name, value[:100], " or ".join("%s=%s" % (name, pattern) for pattern in patterns))
        seen.add(name)
    return ""


# -- what ps shows

def show_as(words):
    """Has ps show these words and not the arguments that Python was started with (Linux): they are overwritten in the
    place from which the kernel takes them."""
    try:
        import ctypes
        with open("/proc/self/stat", "rb") as file:
            start, end = (int(word) for word in file.read().rpartition(b")")[2].split()[45:47])
        if start and end > start:
            ctypes.memmove(start, os.fsencode(words)[:end - start - 1].ljust(end - start, b"\0"), end - start)
    except (ImportError, OSError, ValueError, AttributeError):
        pass        # it shows what the system says


# ---------------------------------------------------------------- cservice: the handler

class JobEnds:
    """A job's descriptors at the worker: theirs, which it inherits, and our ends, each with its source or sink.
    RunningJob makes it, all of it before the job is started, and closes it.  OSError when there are not enough.

    theirs   {descriptor in the job: descriptor here}
    sinks    {descriptor in the job: Sink}, its inputs
    slave    its terminal, which stays open here: what it makes of its own descriptors must not look like the end
    """

    def __init__(self, loop, channel, job):
        self.loop, self.channel, self.session = loop, channel, channel.session
        self.job = job
        self.theirs = {}
        self.to_close = []          # of `theirs`, until it has been started
        self.ends = {}              # {descriptor in the job: our end of it}
        self.sources = {}
        self.sinks = {}
        self.counts = {}            # {input: InputCount}, of those that are pipes
        self.consumed = {}          # {input that the job reads no more: bytes of it that it has read}
        self.master = self.slave = None
        self.copied = job.copied if sees_reading() else frozenset()     # inputs that get a copy first
        share = PIPES_MAX // max(1, len(job.descriptors))
        self.share = 1 << share.bit_length() - 1    # bytes that each may hold in the system, which rounds up
        try:
            self._open()
        except (OSError, ValueError):
            self.close()
            raise

    def _open(self):
        limit, numbers = os.sysconf("SC_OPEN_MAX"), self.job.descriptors
        if len(numbers) > JOB_DESCRIPTORS_MAX:
            raise OSError(errno.EMFILE, "%d descriptors, more than the %d that a job may have" % (
                len(numbers), JOB_DESCRIPTORS_MAX))
        if 0 < limit <= max(numbers, default=0) + 8:
            raise OSError(errno.EMFILE, "descriptor %d is too high for this machine's limit of %d" % (
                max(numbers), limit))
        for fd, kind in numbers.items():
            if isinstance(kind, int):
                self.theirs[fd] = self.theirs[kind]
                continue
            make = {BOTH: self._make_sockets, TTY: self._make_terminal}.get(kind, self._make_pipe)
            make(fd, kind)
            self._attach(fd, kind)

    def _make_terminal(self, fd, kind):
        self.master, self.slave = os.openpty()
        self.ends[fd], self.theirs[fd] = self.master, self.slave
        os.set_blocking(self.master, False)
        rows, columns, _, modes = self.job.terminal
        set_terminal(self.slave, rows, columns, modes)

    def _make_sockets(self, fd, kind):
        pair = socket.socketpair()
        if self.share < SOCKET_FULL:
            for each in pair:
                each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self.share // 2)
        self.ends[fd], self.theirs[fd] = pair[0].detach(), pair[1].detach()
        self.to_close.append(self.theirs[fd])

    def _make_pipe(self, fd, kind):
        reading, writing = os.pipe()
        ours, other = (writing, reading) if kind == IN else (reading, writing)
        self.to_close.append(other)
        self.ends[fd], self.theirs[fd] = ours, other
        os.set_blocking(ours, False)
        if self.share < PIPE_SIZE:
            resize_pipe(ours, self.share)

    def _attach(self, fd, kind):
        ours = self.ends[fd]
        make_source, make_sink = {BOTH: (SocketSource, SocketSink),
                                  TTY: (Source, JobTerminalSink)}.get(kind, (Source, Sink))
        if fd in self.copied:
            make_sink = self._copy_sink(fd)
        if kind in UPWARD:
            sink = self.sinks[fd] = make_sink(
                self.loop, ours, functools.partial(self.channel.consumed, fd),
                functools.partial(self._input_closed, fd), functools.partial(self._input_ended, fd))
            sink.enlarged = sink.enlarged or self.share < PIPE_SIZE
            if kind == IN:
                self.counts[fd] = InputCount(sink)
        if kind in DOWNWARD:
            if kind == BOTH and fd in self.counts:
                make_source = functools.partial(AnswerSource, count=self.counts[fd])
            source = self.sources[fd] = make_source(self.loop, ours,
                                                    functools.partial(self.channel.source_ready, fd))
            source.enlarged = source.enlarged or self.share < PIPE_SIZE

    def _copy_sink(self, fd):
        """What makes the sink of an input that gets a copy first."""
        emptied = functools.partial(self._emptied, fd)
        if self.job.descriptors[fd] == IN:
            return functools.partial(CopySink, emptied=emptied, size=min(self.share, PIPE_FULL))
        self.counts[fd] = SocketCount(self.loop, os.dup(self.theirs[fd]), None, emptied)
        return functools.partial(CopySocketSink, count=self.counts[fd])

    def _emptied(self, fd):
        """The job has read all of a copy: it is to get more."""
        if not self.channel.closed and self.session.phase is RUNNING:
            self.session.emptied(fd)
            self.channel.flush()

    def give(self):
        """The job has been started, or could not be: its ends are its own."""
        for fd in self.to_close:
            os.close(fd)
        self.to_close = []

    def begin(self, leader):
        """The job runs, with this first process: data flows from now on."""
        self.give()
        for count in self.counts.values():
            count.leader = leader
        for sink in self.sinks.values():
            sink.watch_other_side()
        for fd, source in self.sources.items():
            self.channel.add_source(fd, source)

    # -- while it runs
    def read_so_far(self, fd):
        """How much of this input the job has read."""
        count = self.counts[fd].read() if fd in self.counts else None
        return UNKNOWN if count is None else count

    def unstopped(self):
        """{input that was not stopped: how much of it the job has read}, for the exit message."""
        return {fd: self.consumed[fd] if fd in self.consumed else self.read_so_far(fd)
                for fd, stream in self.session.receiving.items() if stream.state != "stopped"}

    def _input_closed(self, fd, error):
        """The job reads this descriptor no more."""
        self.consumed[fd] = self.read_so_far(fd)
        self._close_end(fd, socket.SHUT_WR)
        if not self.channel.closed and self.session.phase is RUNNING:
            self.session.stop(fd, self.consumed[fd])
            self.channel.flush()

    def _input_ended(self, fd):
        """All of it has been written: the job is to see the end."""
        if fd in self.counts:
            self.counts[fd].keep()
        self._close_end(fd, socket.SHUT_WR)

    def output_stopped(self, fd):
        """The submitter reads this output no more."""
        self.channel.drop_source(fd)
        self._close_end(fd, socket.SHUT_RD)

    def output_ended(self, fd):
        """The job has closed its end, or shut down its half of a socket pair."""
        if self.job.descriptors[fd] != BOTH:
            self._close_end(fd)
        elif is_hung_up(self.ends[fd]):
            self.session.stop(fd, self.read_so_far(fd))
            self.sinks[fd].close()

    def _close_end(self, fd, how=None):
        """Shuts one direction of a socket pair, or closes a pipe's end."""
        kind = self.job.descriptors[fd]
        if fd not in self.ends or kind == TTY:
            return          # a terminal stays until the job ends: closing it hangs up
        if kind == BOTH:
            end = socket.socket(fileno=self.ends[fd])
            try:
                end.shutdown(how)
            except OSError:
                pass        # the job has closed its end already
            end.detach()
        else:
            self._close(self.ends.pop(fd))

    def _close(self, end):
        self.loop.watch(end)
        os.close(end)

    def resize(self, size):
        if self.master is not None:
            set_window(self.master, *size)

    def leader_ended(self):
        for count in self.counts.values():
            count.leader_ended()

    def all_sent(self):
        """Whether every output is at its end."""
        return all(stream.state == "ended" for stream in self.session.sending.values())

    def end_outputs(self):
        """Nothing of the job is left that could be waited for: what can be read at once is all."""
        for fd, source in list(self.channel.sources.items()):
            source.ending = True
            self.channel.source_ready(fd)

    def close(self):
        self.give()
        for each in (*self.sinks.values(), *self.sources.values(), *self.counts.values()):
            each.close()
        for end in self.ends.values():
            self._close(end)
        self.ends.clear()
        if self.slave is not None:
            os.close(self.slave)
            self.slave = None


class JobProcess:
    """A job's first process and all that came of it, children of this process.  RunningJob makes it; it may be made
    once there is a pid, and from then on there is no refusal, only an end."""

    def __init__(self, loop, own, pid):
        self.loop, self.own, self.pid = loop, own, pid
        self.ended = False          # the first process has, as left() has seen
        self.wait_status = None     # once it was waited for
        self.killing = None         # a JobKill

    def left(self):
        """The pids of what is left of it.  Those that have ended are waited for, but for the first one: its number is
        its group's, which may be signalled until all has gone."""
        if not self.ended:
            self.ended = has_ended(self.pid) if CAN_PEEK else self.reap()
        if not LINUX:
            if self.killing:
                self.reap()         # elsewhere a zombie passes for a living process
            return [self.pid] if signal_group(self.pid, 0) else []
        found = []
        for pid in self.own.pids():
            if pid == self.pid:
                found += [] if self.ended else [pid]
            elif not is_reaped(pid):
                found.append(pid)
        return found

    def reap(self):
        """Waits for the first process, if it has ended; until then its number stays its own."""
        if self.wait_status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.wait_status = status
        return self.wait_status is not None

    def signal(self, name, terminal):
        """A terminal's job is not stopped when only its user's cexec is suspended.  Without a terminal STOP is sent: an
        orphaned process group ignores TSTP."""
        if self.wait_status is None and not (terminal and name in ("TSTP", "CONT")):
            signal_group(self.pid, signal.SIGSTOP if name == "TSTP" else SIGNAL_NAMES[name])

    def end(self, done):
        """Ends what is left of it, then calls done(); a second call does so at once, with the first one's done."""
        if self.killing:
            return self.killing.kill()
        self.killing = JobKill(self.left)
        self._check_kill(done)

    def _check_kill(self, done):
        if self.killing.look():
            self.killing = None
            self.reap()
            done()
        else:
            self.loop.call_later(KILL_LOOK, lambda: self._check_kill(done))


class RunningJob:
    """One job on the worker: its descriptors, its process, and its report.  A Handler makes it and hears of its end by
    on_job_over(report).  OSError and ValueError when it cannot be started: then nothing of it is there."""

    def __init__(self, handler, job):
        self.handler = handler
        self.loop = handler.loop
        self.channel = handler.channel
        self.session = handler.channel.session
        self.job = job
        self.began = time.monotonic()
        self.wall = dict(handler.settings.limits).get(WALL, math.inf)       # seconds
        self.limit_met = None
        self.wall_timer = NO_TIMER
        self.cleared = False        # nothing of the process and what came of it is left
        self.gone = None            # what to call then, where its submitter has gone
        self.scratch = None         # the Scratch that it stands in
        self.call_status = None     # the CallStatus of an interpreter
        self.resting = False        # it has no call, as the daemon knows
        self.ends = None
        self.process = None
        try:
            self._start(handler.daemon)
        except (OSError, ValueError):
            if self.ends:
                self.ends.close()
            self._remove_scratch(lambda: None)
            raise
        finally:
            if self.scratch:
                os.chdir("/")       # a module that is loaded later comes from nowhere that a job can write

    def _start(self, daemon):
        """All that can fail comes before there is a process."""
        if daemon.scratch:
            self.scratch = Scratch(*daemon.scratch)
            os.chdir(self.scratch.path)
        self.ends = JobEnds(self.loop, self.channel, self.job)
        if daemon.program is not None:
            self._open_calls(daemon.program)
        limits = [(name, value) for name, value in daemon.settings.limits if name != WALL]
        self.process = JobProcess(self.loop, self.handler.own, spawn(
            daemon.path, daemon.command, self._environment(), self.ends.theirs, self.ends.slave, limits))

    def _open_calls(self, program):
        """What an interpreter needs beside the ends that its submitter asks for: the program, and where to show when
        its call has begun."""
        status = shared_file(CallStatus.FORM.size)
        self.ends.to_close.append(status)
        self.call_status = CallStatus(status)
        self.ends.theirs.update({PROGRAM: program, STATUS: status})
        answers = self.ends.sources[ANSWERS]
        self.ends.sources[ANSWERS] = CallAnswers(self.loop, answers.fd, answers.ready)

    def begin(self):
        """The submitter is to hear that it was accepted."""
        if self.call_status:
            self._look_at_call()
        elif self.wall < math.inf:
            self.wall_timer = self.loop.call_later(self.wall, self._out_of_time)
        self.ends.begin(self.process.pid)

    def _look_at_call(self):
        """Under --python the limit of wall counts from a call's start."""
        began = self.call_status.read()
        if began and time.monotonic() - began > self.wall:
            return self._out_of_time()
        if self.resting != (not began):
            self.resting = not began
            self.handler.link.send("REST" if self.resting else "WORK")
        self.wall_timer = self.loop.call_later(CALL_STATUS_LOOK, self._look_at_call)

    def _out_of_time(self):
        self.limit_met = WALL
        self.kill()

    def _environment(self):
        handler, job = self.handler, self.job
        environment = dict(handler.daemon.environment)
        environment.update({
            b"REMOTE_ADDR": handler.remote.encode(), b"REMOTE_PORT": b"%d" % handler.peer[1],
            b"SERVER_ADDR": handler.local[0].partition("%")[0].encode(), b"SERVER_PORT": b"%d" % handler.local[1],
            b"CEXEC_JOB": job.id.encode()})
        environment.update({b"PEER_" + name: value for name, value in job.names})
        if self.scratch:
            folder = os.fsencode(self.scratch.path)
            environment.update({b"TMPDIR": folder, b"PWD": folder, b"CEXEC_DIR": os.fsencode(handler.daemon.folder)})
        if job.terminal:
            environment[b"TERM"] = job.terminal[2]
            for name in (b"LINES", b"COLUMNS"):     # of the terminal that cservice was started from
                environment.pop(name, None)
        return environment

    # -- its end
    def child_changed(self):
        if self.cleared:
            return          # what has ended is no part of the job
        before = self.process.ended
        self.process.left()
        if self.process.ended:
            if not before:
                self.ends.leader_ended()
            self.maybe_over()

    def source_ended(self, fd):
        self.ends.output_ended(fd)
        self.maybe_over()

    def stopped(self, fd):
        self.ends.output_stopped(fd)
        self.maybe_over()

    def maybe_over(self):
        """The job is over when its process has ended, every output is at its end and sent, and what it left behind has
        been ended.  A terminal's output ends when nobody has it open, so there the rest of the session ends first."""
        if self.channel.closed or not self.process.ended or self.process.killing or self.session.phase is not RUNNING:
            return
        if not self.cleared and (self.ends.slave is not None or self.ends.all_sent()):
            self.process.end(self._cleared)
        elif self.cleared and self.ends.all_sent():
            self._remove_scratch(self._report)

    def _cleared(self):
        self.cleared = True
        if self.gone:
            return self._remove_scratch(self.gone)
        self.ends.end_outputs()
        self.maybe_over()

    def _remove_scratch(self, then):
        """Calls then(), the last one given, once the job's folder is removed."""
        def removed(words):
            if words:
                self.handler.log("job %s: %s; the next start tries again" % (self.job.id, words))
            self.scratch = None
            then()
        if self.scratch:
            self.scratch.remove(self.loop, removed)
        else:
            then()

    def _report(self):
        status = self.process.wait_status
        signalled = os.WIFSIGNALED(status)
        number = os.WTERMSIG(status) if signalled else os.WEXITSTATUS(status)
        name = next((name for name, known in SIGNAL_NAMES.items() if known == number), "") if signalled else ""
        self.limit_met = self.limit_met or {"XCPU": "cpu", "XFSZ": "file"}.get(name)
        report = ExitReport(signalled, False, number, int((time.monotonic() - self.began) * 1000), name,
                            "its limit of %s" % self.limit_met if self.limit_met else "", self.ends.unstopped())
        self._release()
        self.handler.on_job_over(report)

    def _release(self):
        self.wall_timer.cancel()
        self.ends.close()

    def kill(self):
        """Ends the job, whatever it does; a second call does so at once."""
        if not self.cleared:
            self.process.end(self._cleared)

    def abandon(self, done):
        """Its submitter has gone: ends the job and then calls done(); a second call hurries that."""
        if self.gone is None:
            self.gone = done
            self._release()
            if self.cleared:
                self._remove_scratch(done)
        self.kill()


class Handler:
    """One connection on the worker, in a process of its own: the channel, and the jobs that come by it in turn.

    The daemon's child makes it and ends with it.  It reports the events of its slot by the link, each before it acts
    on it: `JOB id submitter user`, EXIT, FAILED (it could not be started), LEAVE, STAY; and `GROUP pid` of the job,
    REST and WORK when its interpreter has no call or one, AWAY when its search will never take this worker, `LINE
    text` for the log.  The daemon says LEAVE when this connection shall take no more jobs, STAY when it may again, KILL
    when the job shall end.  The end of the link means that the daemon was killed.
    """
    PATIENCE = 15.0         # seconds for handshake and first job
    IDLE = 1.0              # seconds without a job after which a connection gives its slot back
    LINGER = 5.0            # seconds that a submitter has to read the last words

    def __init__(self, daemon, connection, link, slot):
        self.daemon = daemon
        self.settings = daemon.settings
        self.raw = connection
        self.slot = slot            # a copy, as of the fork
        self.loop = Loop(on_error=self._fault)
        self.link = Link(self.loop, link, self._told)
        self.own = OwnChildren()
        self.peer, self.local = slot.origin.address, None
        self.connection = None
        self.channel = None
        self.running = None         # the RunningJob in hand
        self.remote = None          # the submitter's address, as it says it
        self.timer = self.loop.call_later(self.LINGER if slot.state is SlotState.FREE else self.PATIENCE, self._finish)

    def run(self):
        """Returns the process's exit status."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            self.loop.on_signal(number, lambda number: None)    # they are for the daemon, which says what is to be done
        self.loop.on_signal(signal.SIGCHLD, lambda number: self.running and self.running.child_changed())
        become_subreaper()
        try:
            self.local = self.raw.getsockname()
            self.connection = TlsConnection(self.raw, self.daemon.context, server_side=False)
        except (OSError, ValueError):
            return 1        # a connection that just ends was not needed any more
        self._shake()
        return self.loop.run()

    def _fault(self, error):
        """A fault of this program's own costs this connection."""
        try:
            self.daemon.log.fault(error)
            self.give_up("an internal error at the worker")
        except BaseException:
            os._exit(1)         # the daemon ends what is left of the job

    # -- the channel
    def _shake(self):
        try:
            if not self.connection.handshake():
                return self.loop.watch(self.connection.fileno(), read=self._shake,
                                       write=self._shake if self.connection.unsent else None)
            check_peer(self.connection.tls, self.daemon.key)
        except (OSError, ValueError) as error:
            loss = loss_of(error)
            if loss.kind is BROKEN and isinstance(error, ssl.SSLError):
                self.log("from %s: %s" % (self.peer[0], loss.words))
            return self._finish()
        session = Session(WORKER, 60.0, time.monotonic())
        session.hello(self.local[0].partition("%")[0], self.daemon.instance, sees_reading(),
                      socket.gethostname())
        self.channel = Channel(self.loop, self.connection, session, self)
        if self.slot.state is SlotState.FREE:       # told so meanwhile, or it only shows that it has the key
            self._take_no_more()

    def log(self, line):
        """By the daemon, as long as there is one: its lines are limited together."""
        if self.link.open:
            self.link.send("LINE", line)
        else:
            self.daemon.log(line)

    def _report(self, event, text=""):
        """Records an event of the slot, here and at the daemon."""
        self.slot.move(event)
        self.link.send(event.name, text)

    def _told(self, event, text):
        if event == "END":
            self.give_up("the worker was killed")
        elif event == "KILL":
            self.give_up("the worker was told to stop")
        elif event == "LEAVE":
            self._leave()
        elif self.slot.state is SlotState.LEAVING and not self.channel.closed:
            self._report(SlotEvent.STAY)
            self._others_wait(False)

    def _leave(self):
        """This connection shall take no more jobs: others wait, or the worker wants none."""
        if self.slot.state is SlotState.RUNNING:
            self._report(SlotEvent.LEAVE)
            self._others_wait(True)
        elif self.slot.state is not SlotState.LEAVING:
            self._take_no_more()

    def _others_wait(self, waiting):
        if self.channel.session.phase is RUNNING:
            self.channel.session.others_wait(waiting)
            self.channel.flush()

    # -- what the channel hears
    def on_message(self, kind, number, body):
        if kind == WELCOME:
            self.remote = parse_welcome(body)
        elif kind == JOB:
            self._start(body)
        elif kind == END:
            self.running.ends.sinks[number].finish()
        elif kind == STOP:
            self.running.stopped(number)
        elif kind == SIGNAL:
            self.running.process.signal(body, self.running.job.terminal)
        elif kind == WINDOW:
            self.running.ends.resize(body)
        elif kind == BYE:
            if number:
                self.link.send("AWAY")
            self._finish()

    def on_data(self, number, view):
        return self.running.ends.sinks[number].feed(view)

    def on_source_end(self, number):
        self.running.source_ended(number)

    def on_read_error(self, number, error):
        return 0        # an end that cannot be read any more is at its end

    def on_lost(self, loss):
        """The submitter has gone or cannot be understood: its job ends."""
        if self.running:
            self.log("job %s: submitter lost: %s; the job ends" % (self.running.job.id, loss.words))
        elif loss.kind is PROTOCOL:
            self.log("from %s: %s" % (address_text(self.peer), loss.words))
        self._end_job()

    # -- jobs
    def _start(self, job):
        self.timer.cancel()
        self.channel.tick()         # the job has brought its own timeout
        self._report(SlotEvent.JOB, "%s %s %s" % (job.id, self.remote, job.user))
        self.slot.jobs += 1
        refusal = refusal_of(job.names, self.settings.allow) if self.settings.allow else ""
        if self.daemon.program is not None and job.descriptors != CALL_DESCRIPTORS:
            refusal = "cservice --python serves here: calls of cexec.Executor, no jobs of cexec or cmap"
        if refusal:
            return self.refuse(job, refusal, final=True)
        try:
            if self.settings.user and os.geteuid() == 0:
                become_user(self.settings.user)
                hide_memory()       # which the change has undone
            self.running = RunningJob(self, job)
        except (OSError, ValueError) as error:
            return self.refuse(job, "%s: %s" % (self.daemon.path, fork_reason(error)))
        self.link.send("GROUP", str(self.running.process.pid))
        self.log("job %s: start from %s, pid %d" % (job.id, self.remote_text(), self.running.process.pid))
        self.channel.session.accept(time.monotonic())
        self.running.begin()
        self.channel.flush()

    def refuse(self, job, reason, final=False):
        """The job is not started.  final: asking this worker again would be in vain."""
        self.channel.reset_streams()
        self.channel.session.refuse(reason, final)
        self.log("job %s: refused to %s: %s" % (job.id, self.remote_text(), reason))
        self.slot.move(SlotEvent.EXIT)
        self.link.send("EXIT" if final else "FAILED")
        self._take_no_more()

    def remote_text(self):
        peer = self.peer[0].partition("%")[0]
        return self.remote if self.remote == peer else "%s by %s" % (self.remote, peer)

    def on_job_over(self, report):
        """All of its output is on its way, and nothing of it is left."""
        job, self.running = self.running.job, None
        last = self.slot.state is SlotState.LEAVING
        self.log("job %s: end, %s %d%s, %.3f s, %d bytes in, %d out" % (
            job.id, "signal" if report.signalled else "status", report.number,
            " (%s)" % report.reason if report.reason else "", report.milliseconds / 1000,
            self.channel.received_total, self.channel.sent_total))
        self._report(SlotEvent.EXIT)
        self.channel.reset_streams()
        self.channel.session.exit(report._replace(last=last))
        if last:
            return self._linger()
        self.timer = self.loop.call_later(self.IDLE, self._take_no_more)
        self.channel.flush()

    def _take_no_more(self):
        """Takes no more jobs on this connection.  A job that is on its way here is not started, and its submitter
        learns that from the same words."""
        if self.slot.state is not SlotState.FREE:
            self._report(SlotEvent.LEAVE)
        if not self.channel:
            return
        if self.channel.session.phase is not OVER:
            self.channel.session.abort("no more jobs here")
        self._linger()

    def _linger(self):
        """A submitter that is slow, or asleep, still gets all that the job wrote."""
        self.timer.cancel()
        self.channel.on_ended = self._finish
        self.channel.flush()
        patience = max(self.LINGER, 2 * self.channel.session.timeout) if self.slot.jobs else self.LINGER
        self.timer = self.loop.call_later(patience, self._finish)

    # -- the end
    def give_up(self, reason):
        """The job in hand ends, whatever it does; said again, at once."""
        if not self.running:
            return self._take_no_more() if self.channel else self._finish()
        if not self.channel.closed:
            self.log("job %s: %s; the job ends" % (self.running.job.id, reason))
            self.channel.session.abort(reason)
            self.channel.flush()
        self._end_job()

    def _end_job(self):
        self.channel.close()
        if not self.running:
            return self._finish()
        self._report(SlotEvent.LEAVE)
        self.running.abandon(self._job_gone)

    def _job_gone(self):
        self._report(SlotEvent.EXIT)
        self._finish()

    def _finish(self):
        if self.slot.state is not SlotState.FREE:
            self._report(SlotEvent.LEAVE)
        if self.channel:
            self.channel.close()
        self.loop.stop(0)


def is_hung_up(fd):
    """Whether both directions of a socket pair are closed at the other end."""
    for event in select.POLLIN, select.POLLOUT:     # macOS reports nothing unasked, and each direction by itself
        poll = select.poll()
        poll.register(fd, event)
        if not any(events & select.POLLHUP for _, events in poll.poll(0)):
            return False
    return True


def check_rights(settings, key, words, log):
    """Failure where no job could become the user of --user or have a folder of --scratch; a warning for those of
    COMMAND's words that name a file where such a job does not stand."""
    problem = settings.user and errno_as(settings.user, lambda: None)
    if problem:     # as in a user namespace that has no such user
        raise Failure("--user %s" % settings.user.pw_name, "cannot become this user: %s" % os.strerror(problem),
                      status=EXIT_USAGE)
    if not settings.scratch:
        return
    place, prefix = scratch_place(key)
    problem = errno_as(settings.user, lambda: make_and_remove(place, prefix))
    if problem:
        raise Failure("--scratch", "jobs cannot have a folder in %s: %s" % (place, os.strerror(problem)),
                      "TMPDIR names another place", EXIT_USAGE)
    for name in [word.rpartition("=")[2] for word in words]:
        if not os.path.isabs(name) and os.path.isfile(name):
            log("warning: %s is in this folder, and jobs with --scratch start in another: name it %s" % (
                name, os.path.abspath(name)))


def cservice(arguments, settings):
    """cservice APP COMMAND [ARG...], cservice --stop APP"""
    if settings.stop and len(arguments) == 1:
        return stop_services(load_key(arguments[0])[0], settings.now)
    if settings.stop or settings.now:
        raise Failure("--stop wants a key and nothing else" if settings.stop else "--now goes with --stop", "",
                      "usage: cservice --stop [--now] APP", EXIT_USAGE)
    if settings.python and len(arguments) == 1:
        arguments = [arguments[0], sys.executable]
    if len(arguments) < 2:
        raise Failure("no COMMAND given" if arguments else "no key given", "",
                      "usage: cservice [OPTION...] " + (
                          "--python APP [PYTHON [ARG...]]" if settings.python else "APP COMMAND [ARG...]"), EXIT_USAGE)
    if settings.user and os.geteuid() != 0:
        raise Failure("--user", "only root can change user", "", EXIT_USAGE)
    key, warning = load_key(arguments[0], "private")
    find_command(arguments[1])
    unit = service_unit()
    park_standard()
    close_strays()
    path, starter = settings.log or settings.background and default_log(arguments[0]), None
    if settings.background:
        status, starter = fork_to_background(path, arguments[0])
        if status is not None:
            return status
    log = Log(CSERVICE, file=LogFile(path, starter) if path else None)
    show_as("cservice " + arguments[0])
    import termios, resource            # noqa: what handlers need: after --user they may not be allowed to read them
    check_rights(settings, key, arguments[2:], log)
    if settings.allow:
        import fnmatch          # noqa: for handlers too
    check_tls()
    hide_memory()
    become_subreaper()
    if warning:
        log(warning)
    command, program = arguments[1:], None
    if settings.python:
        import mmap             # noqa: for handlers too
        program = open_program(command, settings.user)
        command = [*command, "-c", PROGRAM_START]
    daemon = Daemon(key, settings, command, log, unit, program)
    if hasattr(gc, "freeze"):       # PyPy has none
        gc.freeze()     # what is here stays, and a handler that does not look at it shares its memory
    return daemon.run()


# ---------------------------------------------------------------- cwho

ASK_ROUND = 0.12            # seconds from one question of a roll call to the next
ASK_SPREAD = 0.1            # seconds over which the answers to one are spread
ASK_ROUNDS = 16             # questions: two seconds
ASK_QUIET = 6               # questions that bring nobody new, after which all have been heard
STRANGERS_MAX = 50          # addresses remembered of those that are not ours
ROLL_CALL_EVERY = 2.0       # seconds between two roll calls of --watch
WATCH_KEPT = 5.0            # seconds for which --watch shows a worker that does not answer
CHECK_PATIENCE = SubmitterConnection.CONNECT + 1.5      # seconds until a worker has said that it could not connect
ADVISED_PORTS = [(20000, 20100)]        # for a hundred jobs at once; below those that systems give out by themselves


class WorkerRow(collections.namedtuple("WorkerRow", "here name address heard by_group key")):
    """A worker that has answered: its Here, what it is called, where the answer came from and when; by_group: that it
    could only be sent to all; the name of its key."""
    __slots__ = ()

    @property
    def free(self):
        return max(0, self.here.slots - self.here.running) if self.here.state == FREE else 0

    @property
    def order(self):
        found = parse_address(self.name.partition(" ")[0].partition("%")[0])
        return self.key, (found[1], socket.inet_pton(found[1], found[0])) if found else (0, b""), self.here.instance

    def json(self):
        import json
        here, record = self.here, self.here._asdict()
        record.update(worker=self.name, state=STATE_NAMES[here.state], free=self.free, load=round(here.load, 3),
                      cost=round(here.cost, 3), speed=round(here.speed, 3), key=self.key,
                      jobs=[job._asdict() for job in here.jobs])
        return json.dumps(record)


class RollCall:
    """Asks with one key who is there, again and again until all have answered; those that have been heard need not
    answer again.

    mouth: the GroupSocket to ask by.  Its owner gives what comes to hear(), and calls begin() for each roll call.
    present: {instance: WorkerRow}; other_keys: {address: key id} of workers of other keys, which no key vouches for.
    on_over, if given, is called at the end of each.
    """

    def __init__(self, loop, key, mouth, flags=0, port=0, on_over=None):
        self.loop, self.key, self.mouth, self.flags, self.port, self.on_over = loop, key, mouth, flags, port, on_over
        self.present, self.sequences = Recent(INSTANCES_MAX), Recent(INSTANCES_MAX)
        self.other_keys, self.problems = Recent(STRANGERS_MAX), []
        self.nonce, self.over = None, True

    def begin(self):
        self.nonce, self.sequence, self.heard, self.quiet, self.over = os.urandom(8), 0, set(), 0, False
        self._ask()

    def _ask(self):
        if self.sequence == ASK_ROUNDS or self.heard and self.quiet == ASK_QUIET:
            self.over = True
            return self.on_over and self.on_over()
        self.sequence += 1
        self.quiet += 1
        body = encode_ask(ASK_SPREAD, self.flags, heard_filter(self.nonce, self.sequence, self.heard))
        self.problems = self.mouth.send(encode_datagram(
            self.key.udp, ASK, self.key.id, self.nonce, self.sequence, body, self.port))
        self.loop.call_later(ASK_ROUND, self._ask)

    def hear(self, datagram, address, by_group=False):
        """A datagram from this address.  One that is not newer than the worker's last is a copy, from anywhere."""
        if (datagram.kind, datagram.nonce) != (HERE, self.nonce):
            return
        if datagram.key_id != self.key.id:
            self.other_keys[address] = "0x" + datagram.key_id.hex()
        if datagram.key_id != self.key.id or not datagram.authentic(self.key.udp):
            return
        here = parse_here(datagram)
        if datagram.sequence <= self.sequences.get(here.instance, -1):
            return
        self.sequences[here.instance] = datagram.sequence
        if here.instance not in self.heard and len(self.heard) < INSTANCES_MAX:
            self.heard.add(here.instance)
            self.quiet = 0
        own = parse_address(here.address)
        self.present[here.instance] = WorkerRow(here, worker_name(own[0], address) if own else address, address,
                                                time.monotonic(), by_group, self.key.name)


COLUMNS = (     # head, format of a cell of some width, the WorkerRow's text
    ("KEY", "%-*s", lambda worker: worker.key),
    ("WORKER", "%-*s", lambda worker: worker.name), ("NAME", "%-*s", lambda worker: worker.here.host),
    ("STATE", "%-*s", lambda worker: STATE_NAMES[worker.here.state]),
    ("JOBS", "%*s", lambda worker: "%d/%d" % (worker.here.running, worker.here.slots)),
    ("WAIT", "%*s", lambda worker: str(worker.here.waiting)), ("DONE", "%*s", lambda worker: str(worker.here.done)),
    ("LOAD", "%*s", lambda worker: "%.1f" % worker.here.load), ("CPUS", "%*s", lambda worker: str(worker.here.cpus)),
    ("SPEED", "%*s", lambda worker: "%.2f" % worker.here.speed),
    ("VERSION", "%-*s", lambda worker: worker.here.version),
    ("COMMAND", "%-*s", lambda worker: worker.here.command + (" (%s)" % worker.here.error) * bool(worker.here.error)))
JOB_COLUMNS = (     # the same for (WorkerRow, RunningNow)
    ("KEY", "%-*s", lambda row: row[0].key), ("WORKER", "%-*s", lambda row: row[0].name),
    ("SUBMITTER", "%-*s", lambda row: row[1].submitter), ("USER", "%-*s", lambda row: row[1].user or "-"),
    ("JOB", "%-*s", lambda row: row[1].id), ("SECONDS", "%*s", lambda row: str(row[1].seconds)))


def columns_text(columns, rows):
    """The lines of a table: a head, and a line for each row."""
    heads, forms, texts = zip(*columns)
    cells = [heads] + [[printable(text(row)) for text in texts] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return ["  ".join(form % cell for form, cell in zip(forms, zip(widths, row))).rstrip() for row in cells]


def worker_table(workers, several=False):
    """The lines of a table of these WorkerRows, and one that sums them up; several: whether they have several keys."""
    total = "%s, %s, %d free" % (count_text(len(workers), "worker"), count_text(
        sum(worker.here.slots for worker in workers), "slot"), sum(worker.free for worker in workers))
    return columns_text(COLUMNS[not several:], workers) + [total]


def job_table(workers, several=False):
    """The same for the jobs that these workers run now."""
    rows = [(worker, job) for worker in workers for job in worker.here.jobs]
    more = ["%s: and %d more" % (worker.name, worker.here.more) for worker in workers if worker.here.more]
    number = len(rows) + sum(worker.here.more for worker in workers)
    total = "%s on %s" % (count_text(number, "job"), count_text(
        sum(bool(worker.here.jobs or worker.here.more) for worker in workers), "worker"))
    return columns_text(JOB_COLUMNS[not several:], rows) + more + [total]


ALIKE = (       # what workers of one key have in common, as a text; what tells two apart, and how it is shown
    ("program versions", lambda here: (here.version, here.version)),
    ("commands", lambda here: (here.digest, here.command)))


def differences(workers):
    """A warning where workers of one key are not alike."""
    warnings = []
    for key in sorted({worker.key for worker in workers}):
        for what, sort in ALIKE:
            names_by_sort = {}
            for worker in workers:
                if worker.key == key:
                    names_by_sort.setdefault(sort(worker.here), []).append(worker.name)
            groups = ["%s on %s%s" % (shown, ", ".join(names[:3]), " and %d more" % len(names[3:]) if names[3:] else "")
                      for (_, shown), names in sorted(names_by_sort.items(), key=lambda item: -len(item[1]))]
            if len(groups) > 1:
                warnings.append("warning: workers of this key run different %s: %s" % (what, "; ".join(groups[:5])))
    return warnings


def free_slots(workers, settings):
    """What --slots prints: how many jobs could start now on the workers that the settings allow; 1 where that is none,
    since programs that start so many at once take 0 for no limit."""
    return max(1, sum(worker.free for worker in workers if is_wanted(
        settings, worker.address, worker.here.address, worker.here.host)))


def open_own_ports(settings):
    """What open_ports() gives for cwho, as soon as there is a free number."""
    told = False
    while True:
        try:
            return open_ports(settings.group, settings.listen_ports)
        except PortTaken as failure:
            if not settings.listen_ports:
                raise
            if not told:
                say(CWHO, "%s; waits for one" % failure)
            told = True
            time.sleep(0.1)


def hear_answers(mouth, calls, on_foreign=None):
    """Gives the datagrams that have come to the roll calls they may be for; on_foreign(address, words) hears of those
    that speak another version."""
    for data, source, _ in mouth.datagrams():
        try:
            datagram = parse_datagram(data)
            for call in calls:
                call.hear(datagram, source[0])
        except ProtocolError as error:
            if on_foreign and speaks_another_version(data):
                on_foreign(source[0], str(error))


def print_all(text):
    """Writes this on standard output, whole.  BrokenPipeError where its reader has gone."""
    data = text.encode("utf-8", "replace")
    try:
        while data:
            data = data[os.write(1, data):]
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise
        raise Failure("standard output", reason_of(error)) from None


class RollCallView:
    """cwho without --check: one roll call of each key, or with --watch one after another."""

    def __init__(self, keys, settings):
        self.loop, self.keys, self.settings = Loop(), keys, settings
        mouth, listener = open_own_ports(settings)
        listener.close()        # nobody is asked to connect
        flags = ASK_JOBS if settings.running_jobs or settings.json else 0
        self.calls = [RollCall(self.loop, key, mouth, flags, on_over=self._over) for key in keys]
        self.loop.watch(mouth.fileno(), read=lambda: hear_answers(mouth, self.calls))
        self.screen = Screen(self.loop, self.draw) if settings.watch and os.isatty(1) else None
        self.ended = collections.deque(maxlen=100)      # lines about the last jobs
        self.began = 0.0                                # when the roll call did
        self.reader = self.ear = None

    def workers(self):
        since = time.monotonic() - WATCH_KEPT
        return sorted((each for call in self.calls for each in call.present.values() if each.heard > since),
                      key=lambda each: each.order)

    def run(self):
        if not self.settings.watch:
            self._begin()
            self.loop.run()
            return self._once(self.workers())
        self.reader = AlertReader(self.keys, 900, time.time())
        self.ear = GroupSocket(self.settings.group, listen=True)
        self.loop.watch(self.ear.fileno(), read=self._alerts)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self.loop.on_signal_unless_ignored(number, lambda number: self.loop.stop(0))
        try:
            if self.screen:
                self.screen.open()
            self._begin()
            return self.loop.run()
        finally:
            if self.screen:
                self.screen.close()

    def _begin(self):
        self.began = time.monotonic()
        for call in self.calls:
            call.begin()

    def _over(self):
        """One roll call is over.  When all are, the next ones begin, if they are wanted: never two of a key at once."""
        if not all(call.over for call in self.calls):
            return
        if not self.settings.watch:
            return self.loop.stop()
        self.draw()
        self.loop.call_at(max(time.monotonic(), self.began + ROLL_CALL_EVERY), self._begin)

    def _once(self, workers):
        if workers:
            self._print(workers)
        for warning in differences(workers) if not self.settings.slots else ():
            say(CWHO, warning)
        missing = [call for call in self.calls if not call.present]
        if missing:
            raise Failure("nobody answered", "asked on %s for key %s%s" % (
                self.settings.group, ", ".join("%s (%s)" % (call.key.fingerprint, call.key.name) for call in missing),
                "".join("; " + problem for problem in missing[0].problems)),
                "cwho --check %s finds out why" % shell_word(missing[0].key.name))
        return 0

    def _print(self, workers, behind=()):
        if self.settings.slots:
            lines = [str(free_slots(workers, self.settings))]
        elif self.settings.json:
            lines = [worker.json() for worker in workers]
        else:
            lines = self._table(workers) + list(behind)
        print_all("".join(line + "\n" for line in lines))

    def _table(self, workers):
        return (job_table if self.settings.running_jobs else worker_table)(workers, len(self.keys) > 1)

    # -- --watch
    def _alerts(self):
        for data, source, _ in self.ear.datagrams():
            for report in self.reader.read(data, source[0], time.time())[0]:
                if report.known:
                    self.ended.append(time.strftime("%H:%M:%S ", time.localtime(report.time)) + report.line())

    def draw(self):
        workers = self.workers()
        if not self.screen:
            self._print(workers, differences(workers) + list(self.ended) + [""])
            return self.ended.clear()
        lines = ["%s  q ends  group %s  key %s" % (time.strftime("%H:%M:%S"), self.settings.group, ", ".join(
            key.name for key in self.keys))] + self.calls[0].problems
        lines += differences(workers) + [""] + (self._table(workers) if workers else ["nobody has answered"])
        self.screen.draw(lines, list(self.ended))


class Screen:
    """A terminal's whole screen, drawn again without being cleared; whoever opens it closes it."""

    def __init__(self, loop, redraw):
        import termios
        self.loop, self.redraw, self.termios, self.modes = loop, redraw, termios, None

    def open(self):
        import tty
        if os.isatty(0):
            self.modes = self.termios.tcgetattr(0)
            set_modes(lambda: tty.setcbreak(0))
            self.loop.watch(0, read=self._typed)
        os.write(1, b"\x1b[?1049h\x1b[?25l\x1b[2J")
        self.loop.on_signal(signal.SIGWINCH, lambda number: self.redraw())
        self.loop.on_signal_unless_ignored(signal.SIGTSTP, self._suspend)

    def close(self):
        """Gives the terminal back as it was."""
        try:
            os.write(1, b"\x1b[?25h\x1b[?1049l")
            if self.modes:
                set_modes(lambda: self.termios.tcsetattr(0, self.termios.TCSADRAIN, self.modes))
        except (OSError, self.termios.error):
            pass        # the terminal has gone

    def _typed(self):
        try:
            typed = os.read(0, 100)
        except OSError:
            typed = b""
        if not typed or b"q" in typed.lower():
            self.loop.stop(0)

    def _suspend(self, number):
        self.close()
        handler = signal.signal(number, signal.SIG_DFL)
        os.kill(0, number)
        signal.signal(number, handler)      # here it has been continued
        self.open()
        self.redraw()

    def draw(self, lines, jobs):
        """The lines, and below them as many of the last jobs as there is room for."""
        size = os.get_terminal_size(1)
        columns, rows = size.columns or 80, size.lines or 24
        shown = min(len(jobs), max(rows - len(lines) - 1, rows // 4))
        if len(lines) > rows - shown:
            lines = lines[:rows - shown - 1] + ["... (%d lines more)" % (len(lines) - rows + shown + 1)]
        lines = (lines + ([""] if shown and len(lines) < rows - shown else []) + jobs[len(jobs) - shown:])[:rows]
        os.write(1, b"\x1b[H" + b"\r\n".join(printable(line)[:columns - 1].encode("utf-8", "replace") + b"\x1b[K"
                                             for line in lines) + b"\x1b[J")


# cwho --check: a Check collects, CheckFacts is what it has found, and the functions below tell what follows from that.

class CheckFacts(collections.namedtuple(
        "CheckFacts", "key_id fingerprint group one_machine ways problems forbidden unheard port ports "
                      "workers excluded translated silent elsewhere other_keys versions own firewall outward")):
    """What cwho --check has found out.

    key_id, fingerprint    of the key, as text
    group        the Group that was asked on       one_machine  whether that is one machine's address
    ways         texts, by which interface and from which address      problems  what was not sent, one for each
    forbidden    whether a firewall here forbids to send
    unheard      what to do where the group reaches no other machine, "" where it does
    port         where answers were expected       ports        those of --listen-ports; None without
    workers      [WorkerRow]                       excluded     instances that the lists leave out
    translated   instances that have tried to connect back to another machine's address
    own          this machine's address towards the group
    silent       addresses from which workers have connected and no datagram came
    elsewhere    [(Group, WorkerRow)] of workers that hear another group
    other_keys   {address: words}                  versions     {address: words} of what speaks another version
    firewall, outward   [(program, chain)] of what filters here what comes in and what goes out
    """
    __slots__ = ()

    @property
    def usable(self):
        """The workers that a job could run on, now or as soon as they have a slot."""
        return [worker for worker in self.workers if worker.here.state in (FREE, BUSY) and worker.here.port
                and worker.here.instance not in self.excluded]

    @property
    def could_run(self):
        return bool(self.usable or self.silent)


def check_findings(facts):
    """The lines that tell what was found."""
    lines = ["asked:     on %s by %s, for key %s" % (facts.group, ", ".join(facts.ways) or "no interface",
                                                    facts.fingerprint)]
    lines += ["not sent:  " + problem for problem in facts.problems]
    lines += ["listened:  on port %d, UDP for answers and TCP for workers that connect back" % facts.port]
    lines += ["worker:    " + worker_text(worker, facts) for worker in facts.workers]
    lines += ["connected: from %s, of which no datagram came" % address for address in facts.silent]
    lines += ["elsewhere: worker %s (%s) hears %s" % (worker.name, worker.here.host, group)
              for group, worker in facts.elsewhere]
    lines += ["version:   %s sends %s" % item for item in sorted(facts.versions.items())]
    if not facts.could_run:
        lines += ["other key: " + words for _, words in sorted(facts.other_keys.items())]
    if facts.one_machine:
        lines.append("note:      of several cservices on %s only the one started last hears this group; for more than "
                     "one take a broadcast or multicast group, or a port each" % facts.group.address)
    lines += differences(facts.workers)
    if not facts.could_run:
        lines.append("result:    no job can run")
    else:
        busy = facts.usable and not any(worker.free for worker in facts.usable)
        lines.append("result:    a job could run" + (" as soon as a slot is free" if busy else ""))
    return list(map(printable, lines))


def worker_text(worker, facts):
    here = worker.here
    back = ("heard, could not connect within %.0f s" % CHECK_PATIENCE if not here.port else
            here.text() if here.state == UNREACHABLE else
            "connected back; %s, %d of %d slots in use" % (here.text(), here.running, here.slots))
    return "%s (%s): %s%s%s" % (
        worker.name, here.host, back, "; it has no way to answer but to all" if worker.by_group else "",
        "; --accept-server or --reject-servers leave it out" if here.instance in facts.excluded else "")


def check_advice(facts):
    """The lines that tell what to do, commands indented: none where all is well."""
    beyond = ["or, where networks differ, on a machine in both, with its address on the workers' side:",
              "    cproxy ADDRESS"]
    if facts.could_run:
        return [] if not facts.silent or facts.workers else [
            "jobs run, but what workers answer by UDP is not heard, as that all are busy:", *let_answers_in(facts),
            *let_them_through(facts, facts.silent[0], "udp")]
    advice = next(advice_for_workers(facts, beyond) if facts.workers else advice_without_workers(facts), None)
    return advice or ["nobody has answered.", *ask_worker(facts), "does one here keep its answers out?",
                      *let_answers_in(facts), *beyond]


def ask_worker(facts):
    """What to look at on a machine that should serve and was not heard."""
    return ["on the worker, is cservice running with key %s and group %s?" % (facts.fingerprint, facts.group),
            "    pgrep -a cservice",
            "does a firewall there keep UDP port %d out?  By its kind, one of:" % facts.group.port,
            *firewall_commands([], [(facts.group.port, facts.group.port)], ["udp"])]


def advice_for_workers(facts, beyond):
    """Yields what to do about the workers that were heard, the first cause first."""
    for worker in facts.workers:
        if worker.by_group:
            own = next((way.rpartition(" from ")[2] for way in facts.ways), "ADDRESS")
            yield ["worker %s has no route to this machine; there, with the name of its interface:" % worker.name,
                   "    ip route add %s dev eth0" % own, "and here, if there is none either:",
                   "    ip route add %s dev eth0" % worker.address, *beyond]
    lost = [worker for worker in facts.workers if worker.here.state == UNREACHABLE or not worker.here.port]
    for worker in lost:
        if worker.here.instance in facts.translated:
            yield between(worker, facts)
    if lost:
        yield let_answers_in(facts) + let_them_through(facts, lost[0].address, "tcp")
    if all(worker.here.instance in facts.excluded for worker in facts.workers):
        yield ["all workers that are there are left out by --accept-server or --reject-servers:",
               "    unset CEXEC_ACCEPT_SERVER CEXEC_ACCEPT_SERVERS CEXEC_REJECT_SERVER CEXEC_REJECT_SERVERS"]
    unable = [worker for worker in facts.workers if worker.here.state == UNABLE]
    if len(unable) == len(facts.workers):
        yield ["no worker can run its command: install it there, or start cservice with its right path:",
               *("%s: %s: %s" % (worker.name, worker.here.command, worker.here.error) for worker in unable[:5])]
    yield ["wait: the workers that are there take no jobs at the moment (%s)" % ", ".join(
        sorted({worker.here.text() for worker in facts.workers}))]


def between(worker, facts):
    """What to do where a worker has tried an address that is not this machine's."""
    if worker.name != worker.address:
        return ["the cproxy at %s is reached by workers as %s, and a firewall there keeps them out; there:" % (
            worker.address, worker.here.back), *firewall_commands([], facts.ports or ADVISED_PORTS),
            "and let it keep to these ports:", "    cproxy --listen-ports %s ..." % ports_text(
                facts.ports or ADVISED_PORTS)]
    return ["an address translator (NAT) is between: worker %s sees this machine as %s, and it is %s;" % (
        worker.name, worker.here.back, facts.own),
        "on a machine that both sides reach, with its address on the workers' side:", "    cproxy ADDRESS"]


def advice_without_workers(facts):
    """Yields what to do where no worker of the key was heard."""
    if facts.forbidden:
        yield ["a firewall of this machine forbids to send; let it out:", *firewall_commands(
            facts.outward, [(facts.group.port, facts.group.port)], ["udp"], outward=True)]
    if facts.elsewhere:
        yield ["workers of this key hear another group; here, or the other way round there:",
               "    export CEXEC_GROUP=%s" % (facts.elsewhere[0][0],)]
    if facts.unheard or len(facts.problems) >= max(1, len(facts.ways)):
        yield [facts.unheard or "mend this machine's network: nothing could be sent"]
    if facts.versions:
        yield ["%s runs another version of this program: copy the same cexec.py to all machines; to compare:" %
               ", ".join(sorted(facts.versions)[:5]), "    cexec.py --version"]
    if facts.other_keys:
        yield ["should one of these serve this key?  Copy the right file: SHA256:%s... is to be shown there by:"
               % facts.key_id, "    ckeygen -l APP", "is it another machine that should?", *ask_worker(facts)]


def let_answers_in(facts):
    """How to open this machine for workers: one number each for TCP and UDP."""
    ports = facts.ports or ADVISED_PORTS
    lines = ["let workers answer this machine, by UDP and TCP:", *firewall_commands(facts.firewall, ports)]
    return lines if facts.ports else lines + ["and keep to these ports:",
                                              "    export CEXEC_LISTEN_PORTS=" + ports_text(ports)]


def let_them_through(facts, worker, protocol):
    """What else may keep a worker's answers away, where nothing is known here that filters what comes in."""
    if facts.firewall:
        return []
    chains = [chain for program, chain in facts.outward if program == "nft" and protocol == "tcp"]
    if chains:
        return ["what filters here is what goes out; let it answer what comes in:",
                *("    nft insert rule %s ct state established,related accept" % chain for chain in chains)]
    return ["or is it a firewall of worker %s that keeps its answers in?  There, by its kind, one of:" % worker,
            *firewall_commands([], facts.ports or ADVISED_PORTS, [protocol], outward=True)]


# program: the command that lets ports in, and out; what stands between the first and the last port.
NFT_RULE = "nft insert rule {chain} {protocol} dport {ports} accept"
FIREWALLS = {"ufw": ("ufw allow {ports}/{protocol}", "ufw allow out {ports}/{protocol}", ":"),
             "firewall-cmd": ("firewall-cmd --add-port={ports}/{protocol}", "", "-"),
             "nft": (NFT_RULE, NFT_RULE, "-")}


def firewall_commands(at_work, ports, protocols=("tcp", "udp"), outward=False):
    """The commands, indented, that let these ports in or out, for [(program, chain)] or one for each kind there is."""
    commands = []
    for program, chain in at_work or [(program, "inet filter " + ("output" if outward else "input"))
                                      for program in FIREWALLS]:
        command, between = FIREWALLS[program][outward], FIREWALLS[program][2]
        for low, high in ports if command else ():
            numbers = "%d%s%d" % (low, between, high) if high > low else str(low)
            commands += ["    " + command.format(chain=chain, protocol=protocol, ports=numbers)
                         for protocol in protocols]
    return commands


def find_firewall(hook):
    """[(program, chain)] of the firewall at work here, for what comes in ("input") or goes out ("output"); [] where
    that cannot be told."""
    if run_quietly("ufw", "status").startswith("Status: active"):
        return [("ufw", "")]
    if run_quietly("firewall-cmd", "--state").startswith("running"):
        return [("firewall-cmd", "")]
    return [("nft", chain) for chain in filter_chains(run_quietly("nft", "list", "chains"), hook)]


def filter_chains(text, hook):
    """"FAMILY TABLE CHAIN" of each chain that filters at this hook, out of what nft lists."""
    table, chain, found = "", "", []
    for words in map(str.split, text.splitlines()):
        if words[:1] == ["table"]:
            table = " ".join(words[1:3])
        elif words[:1] == ["chain"]:
            chain = words[1]
        elif words[:4] == ["type", "filter", "hook", hook]:
            found.append("%s %s" % (table, chain))
    return found


def run_quietly(*argv):
    """What this command of the system prints; "" where it is not there or may not be used."""
    import subprocess
    environment = dict(os.environ, PATH=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin", LC_ALL="C")
    try:
        return subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                              timeout=5, env=environment).stdout.decode("utf-8", "replace")
    except (OSError, subprocess.SubprocessError):
        return ""


class Check:
    """Asks in all the ways there are, and collects CheckFacts from the answers.

    Two roll calls on the group, one with the wish to be connected to; where the group is another one than the default,
    two more for workers that hear that, or the group's port by broadcast.  A worker that has no way back answers by the
    group, and old or new versions and other keys are heard there too.
    """

    def __init__(self, key, settings):
        self.loop, self.key, self.settings, self.group = Loop(), key, settings, settings.group
        self.mouth, listener = open_own_ports(settings)
        self.acceptor = Acceptor(self.loop, listener, self._accept)
        self.silent = []                            # connections that have said nothing yet
        self.arrived = collections.Counter()        # those of workers, by address
        self.overheard = Recent(STRANGERS_MAX)      # {address: what it sends for another key}
        self.versions = Recent(STRANGERS_MAX)       # {address: what it sends in another version}
        self.known = RollCall(self.loop, key, self.mouth, CHECK)
        self.connect = RollCall(self.loop, key, self.mouth, CHECK | CONNECT, self.acceptor.port)
        self.elsewhere = self._other_groups()
        self.calls = [self.known, self.connect, *self.elsewhere]
        try:
            self.ear = GroupSocket(self.group, listen=True)
        except Failure as failure:
            self.ear = None
            say(CWHO, "%s; what is said to all is not heard" % failure)

    def _other_groups(self):
        """A RollCall for each group that workers of the key may hear instead."""
        groups = {parse_group("%s:%d" % (ALL_HOSTS, port)) for port in (PORT, self.group.port)}
        others = [group for group in sorted(groups) if not self.group.loopback
                  and (group.address, group.port) != (self.group.address, self.group.port)]
        by = self.mouth if self.group.family == socket.AF_INET else None
        mouths = []
        for group in others:
            if by is None:
                by, listener = open_ports(group, self.settings.listen_ports)
                listener.close()
            mouths.append(GroupSocket(group, listen=False, by=by))
        return [RollCall(self.loop, self.key, mouth, CHECK) for mouth in mouths]

    def run(self):
        mouths = {call.mouth.fileno(): call.mouth for call in self.calls}
        for mouth in mouths.values():
            self.loop.watch(mouth.fileno(), read=lambda mouth=mouth: hear_answers(
                mouth, self.calls, self.versions.__setitem__))
        if self.ear:
            self.loop.watch(self.ear.fileno(), read=self._overhear)
        for call in self.calls:
            call.begin()
        self.loop.call_later(CHECK_PATIENCE, self.loop.stop)
        self._look()
        self.loop.run()
        facts = self.facts()
        advice = check_advice(facts)
        print_all("\n".join([*check_findings(facts), *(["", "What to do:"] if advice else []), *advice, ""]))
        return 0 if facts.could_run else EXIT_TEMPORARY

    def _accept(self, connection, source):
        self.silent.append(connection)
        if len(self.silent) > CONNECTIONS_MAX:
            self._close(self.silent[0])
        self.loop.watch(connection.fileno(), read=lambda: self._came(connection, source[0]))

    def _close(self, connection):
        self.silent.remove(connection)
        self.loop.watch(connection.fileno())
        connection.close()

    def _came(self, connection, address):
        """Anybody can connect: only who says a worker's first words counts."""
        try:
            parse_preamble(self.key.udp, self.connect.nonce, connection.recv(PREAMBLE_SIZE))
            self.arrived[address] += 1
        except (OSError, ProtocolError):
            pass
        self._close(connection)

    def _overhear(self):
        for data, (address, *_), _ in self.ear.datagrams():
            try:
                datagram = parse_datagram(data)
                for call in self.known, self.connect:
                    call.hear(datagram, address, by_group=True)
                if datagram.key_id != self.key.id and datagram.kind != HERE:
                    self.overheard[address] = "%s sends %s for another key (id 0x%s)" % (
                        address, DATAGRAM_NAMES[datagram.kind], datagram.key_id.hex())
            except ProtocolError as error:
                if speaks_another_version(data):
                    self.versions[address] = str(error)

    def _look(self):
        """Nothing more can come when each worker has said whether it could connect, or none is there."""
        if self.known.over and set(self.known.present) <= set(self.connect.present):
            return self.loop.stop()
        self.loop.call_later(ASK_ROUND, self._look)

    # -- what was found
    def facts(self):
        present, group = dict(self.known.present, **self.connect.present), self.group
        workers = sorted(present.values(), key=lambda worker: worker.order)
        towards = address_towards((group.address, group.port))
        others = {instance: (call.mouth.group, worker) for call in self.elsewhere
                  for instance, worker in call.present.items() if instance not in present}
        keys = dict(self.overheard, **{
            address: "a worker of another key (id %s) is at %s" % (key_id, address)
            for call in self.calls for address, key_id in call.other_keys.items()})
        heard_from = {worker.address for worker in workers}
        facts = CheckFacts(
            key_id=self.key.id.hex(), fingerprint=self.key.fingerprint, group=group,
            one_machine=is_one_machine(group),
            ways=["%s from %s" % (each.name, (each.addresses or [towards])[0]) if each else
                  "the system's choice from %s" % towards for each in self.mouth.targets],
            problems=self.known.problems, forbidden=self.mouth.forbidden, unheard=self.mouth.advice(),
            port=self.acceptor.port, ports=self.settings.listen_ports, workers=workers,
            excluded={worker.here.instance for worker in workers if not is_wanted(
                self.settings, worker.address, worker.here.address, worker.here.host)},
            translated={worker.here.instance for worker in workers if not is_own_address(worker.here.back)},
            silent=[address for address in self.arrived if address not in heard_from],
            elsewhere=[others[instance] for instance in sorted(others)], other_keys=keys, versions=dict(self.versions),
            own=towards, firewall=[], outward=[])
        if facts.could_run and workers:
            return facts
        return facts._replace(firewall=find_firewall("input"), outward=find_firewall("output"))


def cwho(arguments, settings):
    """cwho [OPTION...] APP[.pub]..."""
    if not arguments:
        raise Failure("no key given", "", "usage: cwho [OPTION...] APP[.pub]...", EXIT_USAGE)
    asked = [option for option, given in (
        ("--check", settings.check), ("--slots", settings.slots), ("--watch", settings.watch and settings.check),
        ("--jobs", settings.running_jobs), ("--json", settings.json)) if given]
    if len(asked) > 1 and asked[0] in ("--check", "--slots"):
        raise Failure(" and ".join(asked), "only one of them at a time", status=EXIT_USAGE)
    check_output()
    keys = load_keys(CWHO, arguments)
    try:
        if not settings.check:
            return RollCallView(keys, settings).run()
        return max(Check(key, settings).run() for key in keys)
    except BrokenPipeError:     # as a program that dies of SIGPIPE, but by its exit status
        return 128 + signal.SIGPIPE


def check_output():
    """Failure where standard output is closed: said before anything is done."""
    try:
        os.fstat(1)
    except OSError as error:
        raise Failure("standard output", reason_of(error), status=EXIT_USAGE) from None


# ---------------------------------------------------------------- crat

ALERTS_KEPT = 1 << 16       # alerts of a key remembered, so that none is printed twice; about 10 MB when full
OUTPUT_KEPT = 1 << 21       # bytes kept for a reader that is slow: some seconds of a very busy room
WRITE_MAX = 4096            # bytes written at once: POSIX's pipes do not mix so many with another writer's
KEY_RATE, KEY_BURST = 4000, 8000        # lines a second for each key, and for all where none is given
STRANGERS_RATE, STRANGERS_BURST = 10, 100       # beside keys: nothing vouches for these, so they must not fill a disk
START_SLACK = 1.0           # seconds by which an alert may be older than this crat: clocks of one network agree so far


class Report(collections.namedtuple(
        "Report", "time event submitter worker proxy key key_id known status job reason seconds")):
    """One line of crat, safe to print.

    time       UNIX time at which it was heard     event      "completed" or "rats out"
    submitter  address                             worker     address, or "?"
    key        name as given, None if unknown      key_id     "0x" and eight hexadecimal digits
    known      whether a given key vouches for it  status     exit status; None unless completed
    job        id, "" if it had none               reason     words, "" if none
    proxy      address it came through, "" if none seconds    from the choice of the worker to the end
    """
    __slots__ = ()

    def line(self):
        happened, status = (("rats out", "") if self.status is None else
                            ("completed by", " exit code %d" % self.status))
        return "%s %s %s for %s%s%s%s%s, %.3f s" % (
            self.submitter, happened, self.worker, self.key or "unknown key (%s)" % self.key_id, status,
            self.job and " job " + self.job, self.proxy and " through " + self.proxy,
            self.reason and ": " + self.reason, self.seconds)

    def json(self):
        import json
        return json.dumps(self._asdict())


class AlertHistory:
    """What a reader of alerts keeps of one key (of all unknown ones together, where key is None): so no holder of one
    key can silence the lines of another."""

    def __init__(self, key, rate, burst):
        self.key, self.name = key, printable(key.name) if key else "unknown keys"
        self.bucket, self.count = TokenBucket(rate, burst), 0
        self.seen, self.ages, self.floor = set(), [], -1

    def add(self, name, clock):
        """Remembers an alert that is not among those `seen`, by its age `clock`; False if it is older than what was
        forgotten.  The oldest goes first, and from then on nothing as old as that is new: so no alert is new twice,
        however much came in between."""
        if clock <= self.floor:
            return False
        self.seen.add(name)
        heapq.heappush(self.ages, (clock, name))
        if len(self.ages) > ALERTS_KEPT:
            self.floor, oldest = heapq.heappop(self.ages)
            self.seen.discard(oldest)
        return True


class AlertReader:
    """Tells true alerts from repeated, replayed and forged ones.  Knows no clock and no socket.

    An alert of a known key is true if that key's tag is on it, it was not heard before, and its clock is within
    max_skew seconds of ours (0: any) and not before `started`.  An alert of an unknown key is reported as just that.
    """

    def __init__(self, keys, max_skew, started):
        self.max_skew, self.started = max_skew, started
        self.histories = {}         # {key id: [AlertHistory, ...]}
        for key in keys:
            self.histories.setdefault(key.id, []).append(AlertHistory(key, KEY_RATE, KEY_BURST))
        self.strangers = AlertHistory(None, *(STRANGERS_RATE, STRANGERS_BURST) if keys else (KEY_RATE, KEY_BURST))

    def read(self, data, source, now):
        """([Report of an alert to print, ...], [(topic, text) of what deserves a note, ...]) of one datagram.
        source is the sender's address; now is UNIX time."""
        try:
            datagram = parse_datagram(data)
            if datagram.kind != ALERT:
                return [], []
            alerts = parse_alerts(datagram)
        except ProtocolError as problem:
            return [], [("foreign", "ignored from %s: %s" % (source, problem))] if data[:4] == MAGIC else []
        known = self.histories.get(datagram.key_id)
        history = next((each for each in known or [self.strangers]
                        if not each.key or datagram.authentic(each.key.udp)), None)
        if not history:
            text = "ignored from %s: an alert for %s that is forged or damaged" % (source, known[0].name)
            return [], [("forged", text)]
        reports, notes = [], []
        for alert in alerts:
            # The same alert may come again in a datagram with another nonce or sequence, alone or among others.
            name = hashlib.sha256(datagram.key_id + encode_alert(alert)).digest()[:16]
            if name in history.seen:
                continue
            topic, words = self._refusal(name, alert, history, now)
            if topic:
                notes.append(((topic, history.name), "not shown from %s for %s: %s" % (source, history.name, words)))
                continue
            submitter, (worker, _, proxy) = alert.submitter, alert.worker.partition(" by ")
            job = alert.job
            if not (job.isascii() and job.replace("-", "").replace(".", "").isalnum() and len(job) <= 64):
                job = ""        # that is no id
            event, status = ("completed", alert.status) if alert.verdict == COMPLETED else ("rats out", None)
            reports.append(Report(
                round(now, 3), event, submitter if parse_address(submitter) else source,
                worker if parse_address(worker) else "?", proxy if parse_address(proxy) else "",
                history.name if history.key else None, "0x" + datagram.key_id.hex(), bool(history.key),
                status, job, alert.words, alert.milliseconds / 1000))
        return reports, notes

    def _refusal(self, name, alert, history, now):
        """(topic, words) of a note why this alert, new by its name, is not printed; empty texts where it is."""
        ahead, by_clock = alert.clock / 1000 - now, bool(history.key and self.max_skew)
        if by_clock and (abs(ahead) > self.max_skew or now + ahead < self.started - START_SLACK):
            return "stale", ("an alert whose clock is %.0f s %s ours: replayed, older than this crat, or a clock "
                             "is wrong (see CRAT_MAX_SKEW)" % (abs(ahead), "ahead of" if ahead > 0 else "behind"))
        if not history.bucket.take(now):
            return "rate", "more than %d alerts a second" % history.bucket.rate
        history.count += 1
        if not history.add(name, alert.clock if by_clock else history.count):
            return "old", "an alert older than the last %d, which are all that is remembered" % ALERTS_KEPT
        return "", ""


class Crat:
    """Hears alerts and prints them until it is told to stop."""

    FINISH = 1.0            # seconds that a slow reader of the last lines is given at the end

    def __init__(self, keys, settings):
        self.settings, self.log = settings, Log(CRAT)
        self.names = ", ".join("%s (%s)" % (key.name, key.fingerprint) for key in keys) or "none"
        self.reader = AlertReader(keys, settings.max_skew, time.time())
        self.socket, self.loop = GroupSocket(settings.group, listen=True), Loop(on_error=self.log.fault)
        self.output = open_sink(self.loop, 1, self._written, self._failed, self.loop.stop)
        self.output.join = WRITE_MAX
        self.unwritten, self.error = 0, None        # bytes that wait; why standard output takes no more

    def run(self):
        """Returns None when told to stop, or the error of standard output."""
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                self.loop.on_signal_unless_ignored(number, self._finish)
            self.loop.watch(self.socket.fileno(), read=self._hear)
            self.loop.call_every(REFRESH_EVERY, self.socket.refresh)
            self.log("ready: hears %s, keys: %s" % (self.settings.group, self.names))
            self.loop.run()
            return self.error
        finally:
            for each in self.output, self.socket, self.loop:
                each.close()

    def _finish(self, number):
        self.loop.watch(self.socket.fileno())
        self.loop.call_later(self.FINISH, self.loop.stop)
        self.output.finish()

    def _written(self, size):
        self.unwritten -= size

    def _failed(self, error):
        self.error = error
        self.loop.stop()

    def _hear(self):
        for data, source, _ in self.socket.datagrams():
            reports, notes = self.reader.read(data, source[0], time.time())
            for report in reports:
                line = report.json() if self.settings.json else report.line()
                if self.settings.time and not self.settings.json:
                    line = time.strftime("%Y-%m-%dT%H:%M:%S ", time.localtime(report.time)) + line
                data = (line + "\n").encode("utf-8", "backslashreplace")
                if self.unwritten + len(data) > OUTPUT_KEPT:
                    notes.append(("full", "standard output is not read: lines lost"))
                else:
                    self.unwritten += len(data)
                    self.output.feed(memoryview(data))
            for topic, text in notes:
                self.log.note(topic, text)
        self.log.datagrams_lost(self.socket.dropped)


def crat(arguments, settings):
    """crat [APP.pub...]: prints a line for every alert until SIGTERM or SIGINT, then returns 0.

    Up to OUTPUT_KEPT bytes wait for a slow reader; what is lost beyond that is said on standard error.  When the reader
    of standard output is gone it ends as a filter does that dies of SIGPIPE, but by its exit status; with any other
    error of standard output it fails.
    """
    check_output()
    error = Crat(load_keys(CRAT, arguments, some=True), settings).run()
    if error is not None and error.errno != errno.EPIPE:
        raise Failure("standard output", reason_of(error))
    return 0 if error is None else 128 + signal.SIGPIPE


# ---------------------------------------------------------------- cproxy
# A datagram heard on GROUP is sent again to TARGET; one that asks workers to connect back, with a listener's port of
# ours.  A worker that connects there is relayed to the submitter, once its preamble shows that it answers that very
# datagram.  Before the submitter's GO nothing but the preamble passes, so what is no submitter answers nobody.
# What workers answer by datagram comes to the socket that asked them, and goes to where the question came from.

LISTENERS_MAX = 256         # announcements and roll calls at once; the one silent for longest makes room
LISTENERS_PER_SOURCE = 64   # of these, for one submitting host: a stranger's flood must not close all the others'
LISTENER_SECONDS = 30.0     # each is kept so long after it was last heard: cexec repeats its own every 5 s at most
ACTIVE_LEAST, ACTIVE_MOST = 4, 64       # that get to the submitter at once: as many as it wants slots; others wait
SETTLED_SECONDS = 1.0       # after which one that was chosen makes room for another
BEYOND_WANTED = 64          # connections kept for one announcement beyond the slots that it wants
RELAYS_MAX = 2000           # connections in all, as far as descriptors suffice: two for each
PREAMBLE_SECONDS = 10.0     # to say the preamble
HANDSHAKE_MAX = 4096        # bytes that a submitter sends at most to a worker that it then does not take
DUPLICATE_SECONDS = 60.0    # a datagram heard again within this time is the same one, come back around a loop
DUPLICATES_MAX = 1 << 17    # datagrams remembered for that, more than SEND_RATE lets through; beyond, none passes
COPIES = {ALERT: 3}         # times that one datagram passes; else once.  cexec repeats alerts, against loss
SEND_RATE, SEND_BURST = 2000, 2000          # datagrams a second in all, each way: about 200 jobs a second
SOURCE_RATE, SOURCE_BURST = 1000, 1000      # from one address
SOURCES_MAX = 1024          # addresses whose rate is remembered
PIECE = 1 << 18             # bytes read at once, and held for a slow reader; smaller ones cost speed
RELAYS_FEW = 128            # with more than these only small pieces are read:
SMALL_PIECE = 1 << 14       # so all relays hold 128 MiB at most
PUMP_ROUNDS = 16            # reads and writes in a row before others get their turn
SWEEP_SECONDS = 1.0
TEXT = bytes(range(32, 127)) + b"\t\r\n"    # GO is random; a banner made of these alone is some other server's


class Direction:
    """What may be carried one way: so much of each source and of all, each datagram once."""

    def __init__(self):
        self.total, self.sources = TokenBucket(SEND_RATE, SEND_BURST), Recent(SOURCES_MAX)
        self.passed = collections.OrderedDict()     # {hash of a datagram: (times, when first)}

    def within_rates(self, source, now):
        self.sources[source] = self.sources.get(source) or TokenBucket(SOURCE_RATE, SOURCE_BURST)
        return self.sources[source].take(now) and self.total.take(now)

    def may_pass(self, datagram, now):
        """Whether this datagram may pass (once more), whatever its port; counts it.  Where as many are remembered as
        may be, nothing new passes before one may be forgotten: a loop dies out whatever goes around in it."""
        name = hashlib.sha256(datagram.data[:6] + datagram.data[8:]).digest()[:16]
        while self.passed and next(iter(self.passed.values()))[1] < now - DUPLICATE_SECONDS:
            self.passed.popitem(last=False)
        times, first = self.passed.get(name, (0, now))
        if times >= COPIES.get(datagram.kind, 1) or not times and len(self.passed) >= DUPLICATES_MAX:
            return False
        self.passed[name] = times + 1, first
        return True


class Pump:
    """One direction of a relay: bytes that came from `source` go to `sink`; most(): how many are held in between.

    They are copied: splicing them through a pipe is no faster here, and needs three times the descriptors.
    at: the side used last, which is the broken one when pump() raises OSError.
    """

    def __init__(self, source, sink, most, pending=b"", moved=0):
        self.source, self.sink, self.most, self.at = source, sink, most, source
        self.pending, self.moved = memoryview(pending), moved   # read and not yet sent; bytes sent
        self.ended = self.over = False          # the source has ended; the sink has been told so

    def pump(self):
        """Moves what can be moved now."""
        for _ in range(0 if self.over else PUMP_ROUNDS):
            self.at = self.sink if self.pending or self.ended else self.source
            try:
                if self.pending:
                    sent = self.sink.send(self.pending)
                    self.pending = self.pending[sent:]
                    self.moved += sent
                elif self.ended:
                    self.over = True
                    return self.sink.shutdown(socket.SHUT_WR)
                else:
                    self.pending = memoryview(self.source.recv(self.most()))
                    self.ended = not self.pending
            except BlockingIOError:
                return


class ProxyListener:
    """What was heard under one nonce from one address, and the port on the far side that stands for the one it names.

    Made and ended by Cproxy.  secret: of the key that it is authentic for; None where none was given.
    submitter: where to connect for the workers.  asker: where its datagrams come from, and answers go.
    wanted: how many slots it can use now.
    """

    def __init__(self, datagram, source, secret):
        self.key_id, self.nonce, self.secret = datagram.key_id, datagram.nonce, secret
        self.submitter, self.asker, self.heard = (source[0], datagram.port, *source[2:]), source, 0.0
        self.acceptor, self.port = None, 0          # where nobody is asked to connect
        self.wanted = 0
        self.relays = {}                            # ProxyRelays as keys, in the order of arrival
        self.chosen = 0                             # how many were told to go on

    def having(self, *states):
        """Its relays in these states, the oldest first."""
        return [relay for relay in self.relays if relay.state in states]

    def serve_waiting(self):
        """Connects as many to the submitter as may be there at once.  Next is one whose address has the fewest there:
        no address keeps the others waiting."""
        waiting, active = self.having(RelayState.WAITING), self.having(*ACTIVE)
        while waiting and len(active) < max(ACTIVE_LEAST, min(self.wanted, ACTIVE_MOST)):
            busy = collections.Counter(relay.address for relay in active)
            relay = min(waiting, key=lambda relay: busy[relay.address])
            waiting.remove(relay)
            active.append(relay)
            relay.ask()


# PREAMBLE    the worker has yet to say that it answers this announcement
# WAITING     enough others are active for this announcement
# ASKED       the submitter gets the preamble and has yet to choose; nothing else has passed
# RUNNING     bytes pass
# SETTLED     the same, and the submitter has its hand free for another worker
RelayState = enum.Enum("RelayState", "PREAMBLE WAITING ASKED RUNNING SETTLED OVER")
ACTIVE = RelayState.ASKED, RelayState.RUNNING   # one of those that are at the submitter
PASSING = ACTIVE + (RelayState.SETTLED,)        # one that gets a line, and that a drain waits for


class ProxyRelay:
    """One worker's connection, from its arrival at a ProxyListener to its end."""

    def __init__(self, proxy, number, listener, worker, address):
        self.proxy, self.loop, self.number, self.listener, self.worker = proxy, proxy.loop, number, listener, worker
        self.address, self.names = address[0], "%s to %s" % (address_text(address), address_text(listener.submitter))
        self.submitter, self.asking, self.pumps, self.began = None, None, (), time.monotonic()
        self.preamble = b""
        self.state = RelayState.PREAMBLE
        self.deadline = self.began + PREAMBLE_SECONDS
        self.chosen_at = math.inf
        self.loop.watch(worker.fileno(), read=self._read_preamble)

    def _read_preamble(self):
        listener = self.listener
        try:
            self.preamble = receive_up_to(self.worker, self.preamble, PREAMBLE_SIZE)
            if not preamble_may_follow(self.preamble, listener.nonce):
                raise ProtocolError("not an answer to this announcement")
            if len(self.preamble) < PREAMBLE_SIZE:
                return
            tune(self.worker)
            if listener.secret:
                parse_preamble(listener.secret, listener.nonce, self.preamble)
        except (OSError, EOFError, ProtocolError) as error:
            return self.end(reason_of(error))
        # From here on the worker says nothing before the submitter does: only its end can come.
        self.state, self.deadline = RelayState.WAITING, math.inf
        self.loop.watch(self.worker.fileno(), read=lambda: self.end("the worker closed or spoke too early"))
        listener.serve_waiting()

    def ask(self):
        """It is this one's turn.  One byte more than GO has is read: another server that says more than that at once
        is found out."""
        self.state = RelayState.ASKED
        self.asking = SubmitterConnection(self.loop, self.listener.submitter, self.preamble, lambda: None,
                                          self._answered, self._not_answered, GO_SIZE + 1)

    def _not_answered(self, problem):
        self.end("the submitter: " + os.strerror(problem) if problem else "not chosen")

    def _answered(self, submitter, go):
        self.submitter, secret = submitter, self.listener.secret
        if not (any(hmac.compare_digest(go, encode_go(secret, self.preamble, wanted)) for wanted in (True, False))
                if secret else len(go) == GO_SIZE and go.strip(TEXT)):
            return self.end("another program answers at the submitter's port")
        self.state, self.chosen_at = RelayState.RUNNING, time.monotonic()
        self.listener.chosen += 1
        self.pumps = (Pump(self.worker, submitter, self.proxy.piece, moved=PREAMBLE_SIZE),
                      Pump(submitter, self.worker, self.proxy.piece, go))
        self._pump(self.pumps[1])

    def settle(self):
        """It keeps nobody waiting any more."""
        if self.state is RelayState.RUNNING:
            self.state = RelayState.SETTLED
            self.listener.serve_waiting()

    def _pump(self, pump):
        try:
            pump.pump()
        except OSError as error:
            return self._broken(pump, error)
        self.deadline = time.monotonic() + self.proxy.idle
        up, down = self.pumps
        if up.over and down.over:
            return self.end()
        if down.ended:
            self.settle()       # the submitter has done with it, whether or not the worker notices
        for side, reading, writing in (self.worker, up, down), (self.submitter, down, up):
            self.loop.watch(side.fileno(),
                            None if reading.over or reading.pending else lambda pump=reading: self._pump(pump),
                            (lambda pump=writing: self._pump(pump)) if writing.pending else None)

    def _broken(self, pump, error):
        """One direction is broken.  What the other has in hand came before that, and still goes where it can."""
        up, down = self.pumps
        other = up if pump is down else down
        try:
            other.pump()
        except OSError:
            pass
        by_submitter = pump.at is self.submitter
        if other.ended:
            # The side that refuses has ended its own direction before: it closed, as programs do that are done.
            self.end(None if pump.ended else "closed while bytes were on their way")
        elif (by_submitter and self.listener.chosen > 1 and down.moved <= HANDSHAKE_MAX
                and time.monotonic() < self.began + SubmitterConnection.GO):
            self.end("not chosen")      # of several that shook hands the submitter takes one and drops the others
        else:
            self.end("%s: %s" % ("the submitter" if by_submitter else "the worker", reason_of(error)))

    def end(self, why=None):
        """Ends it: after both ends of data quietly, else with a reset to both sides and the reason in the log."""
        if self.state is RelayState.OVER:
            return
        tell = self.state in PASSING
        self.state = RelayState.OVER
        if self.asking:
            self.asking.close()
        for side in filter(None, (self.worker, self.submitter)):
            self.loop.watch(side.fileno())
            close_socket(side, reset=why is not None)
        if tell:
            up, down = [pump.moved for pump in self.pumps] or (0, 0)
            self.proxy.log("relay %d: %s: %s, %d bytes to the submitter, %d to the worker, %.3f s" % (
                self.number, self.names, why or "ended", up, down, time.monotonic() - self.began), bool(self.pumps))
        self.proxy.over(self)


def close_socket(connection, reset=False):
    """Closes it; with a reset, so that the other side cannot mistake this for an end of data."""
    try:
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("@ii", 1, 0))
    except OSError:
        pass
    connection.close()


class Cproxy:
    """Carries what is heard on one group over to another, and the answers back: connections and datagrams."""

    def __init__(self, source, target, keys, settings):
        self.source, self.target, self.ports, self.idle = source, target, settings.listen_ports, settings.idle
        self.log = Log(CPROXY)
        self.secrets = {}           # {key id: secrets of the keys given}; empty: all datagrams pass
        for key in keys:
            self.secrets.setdefault(key.id, []).append(key.udp)
        self.inside = GroupSocket(settings.group, listen=True)
        self.outside = open_first(self.ports, target.port, lambda number: GroupSocket(target, False, source, number))
        self.outside.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)    # a roll call's answers
        self.own = self.outside.socket.getsockname()[:2]
        self.forth, self.back = Direction(), Direction()
        self.listeners = {}         # {name: ProxyListener}, oldest first
        self.relays = {}            # ProxyRelays as keys, oldest first
        self.count, self.draining = 0, False
        others = LISTENERS_MAX + 64
        self.most = max(8, (raise_descriptor_limit(2 * RELAYS_MAX + others) - others) // 2)
        self.loop = Loop(on_error=self.log.fault)

    def piece(self):
        """How much a relay reads at once."""
        return PIECE if len(self.relays) <= RELAYS_FEW else SMALL_PIECE

    def run(self, words):
        """Returns 0 when told to stop."""
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                self.loop.on_signal_unless_ignored(number, self._drain)
            self.loop.watch(self.inside.fileno(), read=lambda: self._hear(self.inside, self._forward))
            self.loop.watch(self.outside.fileno(), read=lambda: self._hear(self.outside, self._bring_back))
            self.loop.call_every(REFRESH_EVERY, self.inside.refresh)
            self.loop.call_every(REFRESH_EVERY, self.outside.refresh)
            self.loop.call_every(SWEEP_SECONDS, self._sweep)
            self.log("ready: " + words, always=True)
            self.loop.run()
        finally:
            self._close_listeners(lambda *_: True)
            for relay in list(self.relays):
                relay.end("cproxy was stopped")
            for each in self.inside, self.outside, self.loop:
                each.close()
        return 0

    def _drain(self, number):
        """The first signal lets what is running end, the second does not."""
        passing = sum(relay.state in PASSING for relay in self.relays)
        if self.draining or not passing:
            return self.loop.stop()
        self.draining = True
        self.loop.watch(self.inside.fileno())
        self.loop.watch(self.outside.fileno())
        self._close_listeners(lambda *_: True)
        self.log("stopping: waits for %d relays" % passing)

    # -- datagrams
    def _hear(self, group, act):
        for data, source, index in group.datagrams():
            try:
                act(parse_datagram(data), source, index)
            except ProtocolError:
                pass
        self.log.datagrams_lost(self.inside.dropped)

    def _forward(self, datagram, source, index):
        """From the near side to the far one.  No worker connects to a port below 1024."""
        kind, data = datagram.kind, datagram.data
        if source[:2] == self.own or index and index == self._far_link() or kind == HERE:
            return          # it is on the far side already, or nobody asked for it
        connects = datagram.port >= 1024 and (kind == ANNOUNCE or kind == ASK and parse_ask(datagram)[1] & CONNECT)
        secret = next((secret for secret in self.secrets.get(datagram.key_id, ()) if datagram.authentic(secret)), None)
        if (kind == ANNOUNCE and not connects or self.secrets and not secret
                or not self._may_pass(datagram, source[0], self.forth)):
            return
        if kind in (ANNOUNCE, ASK):
            listener = self._listener_for(datagram, source, secret, connects)
            if not listener:
                return
            data = with_port(data, listener.port)
        elif kind == TAKEN:     # believed only where the announcement came from
            self._close_listeners(lambda name, _: name[:4] == (source[0], source[3:], datagram.key_id, datagram.nonce))
        problems = self.outside.send(data)
        if problems:
            self.log.note("send", "cannot send to %s: %s" % (self.target, ", ".join(problems)))

    def _bring_back(self, datagram, source, index):
        """A worker's answer, to where the question came from."""
        if datagram.kind != HERE:
            return
        parse_here(datagram)
        asked = next((each for each in self.listeners.values()
                      if (each.key_id, each.nonce) == (datagram.key_id, datagram.nonce)), None)
        if (asked and (not asked.secret or datagram.authentic(asked.secret))
                and self._may_pass(datagram, source[0], self.back)):
            self.inside.send_to(datagram.data, asked.asker)

    def _far_link(self):
        """The number of the far link: what comes in by it is no near datagram.  0 where there is none, or where GROUP
        has the same one and TARGET is a machine beyond it."""
        far = self.outside.home
        if far is None or far.loopback:
            return 0
        near = {interface.index for interface in self.inside.targets if interface}
        beyond = self.target.kind == "unicast" and self.target.address != far.broadcast
        return 0 if beyond and near == {far.index} else far.index

    def _may_pass(self, datagram, source, direction):
        """Whether the rates allow it, and it has not passed before."""
        now = time.monotonic()
        if direction.within_rates(source, now):
            return direction.may_pass(datagram, now)
        return self.log.note("rate", "too many datagrams from %s: some not carried on" % source)

    # -- listeners
    def _listener_for(self, datagram, source, secret, connects):
        """The ProxyListener for this announcement or roll call, opened if need be; None when none can be had."""
        name = (source[0], source[3:], datagram.key_id, datagram.nonce, datagram.port)
        if name not in self.listeners:
            same = [other for other in self.listeners if other[0] == name[0]]
            if len(same) >= LISTENERS_PER_SOURCE:
                self._close_oldest(same)
            elif len(self.listeners) >= LISTENERS_MAX:
                self._close_oldest(self.listeners)
            listener = ProxyListener(datagram, source, secret)
            try:
                if connects:
                    self._listen(listener)
            except Failure as problem:
                return self.log.note("listener", "cannot carry on an announcement of %s: %s" % (source[0], problem))
            self.listeners[name] = listener
        listener = self.listeners[name]
        listener.asker, listener.heard = source, time.monotonic()
        if datagram.kind == ANNOUNCE:
            listener.wanted = parse_announcement(datagram).wanted
            listener.serve_waiting()
        return listener

    def _listen(self, listener):
        """A port for its workers.  It may be shared with relays that came by it before: each has its own submitter."""
        address, family, scope = self.source
        listening = open_first(self.ports, self.target.port, lambda number: listen_at(
            socket_address(family, address, number, scope), family, BEYOND_WANTED, share=number))
        listener.acceptor = Acceptor(
            self.loop, listening, lambda worker, address: self._accepted(listener, worker, address), self._may_accept,
            self._out_of_descriptors)
        listener.port = listener.acceptor.port

    def _close_oldest(self, names):
        self._close_listener(min(names, key=lambda name: self.listeners[name].heard))

    def _close_listeners(self, unwanted):
        """Those for which unwanted(name, listener) holds."""
        for name in [name for name, listener in self.listeners.items() if unwanted(name, listener)]:
            self._close_listener(name)

    def _close_listener(self, name):
        """Whoever has not got through by now gets a reset."""
        listener = self.listeners.pop(name)
        if listener.acceptor:
            listener.acceptor.close()
        for relay in listener.having(RelayState.PREAMBLE, RelayState.WAITING):
            relay.end("not needed")

    # -- connections
    def _may_accept(self):
        """A worker says its preamble at once, so where no more can be had the oldest that is silent makes room."""
        return len(self.relays) < self.most or self._end_silent(self.relays)

    def _accepted(self, listener, worker, address):
        """Where an announcement has as many as may be, one that is silent makes room, else one of the crowd that waits
        from one address."""
        if len(listener.relays) >= BEYOND_WANTED + listener.wanted and not self._end_silent(listener.relays):
            waiting = listener.having(RelayState.WAITING)
            crowd = collections.Counter(relay.address for relay in waiting)
            most, count = crowd.most_common(1)[0] if crowd else ("", 0)
            if count <= crowd[address[0]] + 1:
                return close_socket(worker, reset=True)
            next(relay for relay in waiting if relay.address == most).end("not needed")
        self.count += 1
        relay = ProxyRelay(self, self.count, listener, worker, address)
        self.relays[relay] = listener.relays[relay] = True

    def _end_silent(self, relays):
        """Ends the oldest of these that has said nothing yet; whether there was one."""
        silent = next((relay for relay in relays if relay.state is RelayState.PREAMBLE), None)
        if silent:
            silent.end("it said nothing, and others connected")
        return bool(silent)

    def _out_of_descriptors(self):
        self.log.note("descriptors", "out of descriptors: workers have to wait")
        if not self.relays:
            self._close_oldest(self.listeners)
        else:
            self._end_silent(self.relays)

    def over(self, relay):
        """Called once by every relay at its end."""
        self.relays.pop(relay, None)
        relay.listener.relays.pop(relay, None)
        relay.listener.serve_waiting()
        if self.draining and not self.relays:
            self.loop.stop()

    # -- time
    def _sweep(self):
        now = time.monotonic()
        for relay in list(self.relays):
            if relay.deadline < now:
                relay.end("silent" if relay.state is RelayState.PREAMBLE else "idle")
            elif relay.chosen_at < now - SETTLED_SECONDS:
                relay.settle()
        self._close_listeners(lambda _, listener: listener.heard < now - LISTENER_SECONDS)


def cproxy(arguments, settings):
    """cproxy SELF [TARGET]: carries what is heard on GROUP to TARGET, sent from this host's address SELF, and what the
    workers answer back, until SIGTERM or SIGINT; then returns 0 when the last relay has ended."""
    if not 1 <= len(arguments) <= 2:
        raise Failure("SELF [TARGET] expected", "%d arguments given" % len(arguments), "see cproxy --help", EXIT_USAGE)
    source = parse_address(arguments[0])
    if not source or kind_of(*source[:2]) != "unicast":
        raise Failure("SELF=" + arguments[0], "not accepted", "accepted: a numeric address of this host", EXIT_USAGE)
    try:
        target = parse_group(arguments[1] if arguments[1:] else ALL_HOSTS)
    except ValueError as error:
        raise Failure("TARGET=" + arguments[1], "not accepted", "accepted: %s" % error, EXIT_USAGE) from None
    if target.family != source[1]:
        raise Failure("SELF=%s TARGET=%s" % (source[0], target), "both must be IPv4 or both IPv6", status=EXIT_USAGE)
    keys = load_keys(CPROXY, settings.keys)
    return Cproxy(source, target, keys, settings).run("hears %s, tells %s from %s, %s" % (
        settings.group, target, source[0],
        "carries " + ", ".join("%s (%s)" % (key.name, key.fingerprint) for key in keys) if keys
        else "carries every key: --key carries those it names only"))


# ---------------------------------------------------------------- key files and ckeygen

EXIT_BAD_PRIVATE, EXIT_NO_PUBLIC, EXIT_NO_PRIVATE, EXIT_OTHER_KEY = 101, 102, 103, 104
SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.EAGAIN)     # these may pass by themselves
CKEYGEN_USAGE = "usage: ckeygen [-stdin] APP [APP.pub], or ckeygen -l FILE..."


def read_key(path):
    """(text, Key, warning or None) of this one file, None where there is none; Failure when it is of no use."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)      # opening a FIFO must not wait
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "not a regular file")
            text = os.read(descriptor, KEY_FILE_LIMIT + 1)
        finally:
            os.close(descriptor)
    except OSError as problem:
        if problem.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
            return None
        raise Failure("cannot read the key %s" % path, reason_of(problem),
                      status=EXIT_TEMPORARY if problem.errno in SHORTAGES else EXIT_USAGE) from None
    key, warning, mode = parse_key(text, path), None, stat.S_IMODE(status.st_mode)
    if mode & 0o077:
        warning = "warning: others can use the key %s (mode %04o); to stop that: chmod 600 %s" % (path, mode, path)
    elif status.st_uid not in (os.geteuid(), 0):
        warning = "warning: the key %s belongs to another user (%d), who can read and change it" % (path, status.st_uid)
    return text, key, warning


def load_keys(tool, paths, some=False):
    """The Keys in these files, either half; what is wrong and no failure is said.  some: one that is bad is left out
    where another is good."""
    keys, failures = [], []
    for path in paths:
        try:
            key, warning = load_key(path)
        except Failure as failure:
            failures.append(failure)
            continue
        keys.append(key)
        if warning:
            say(tool, warning)
    if failures and not (some and keys):
        raise failures[0]
    for failure in failures:
        say(tool, "%s; goes on without it" % failure)
    return keys


def load_key(path, want=None):
    """(Key, warning or None) from the file PATH, or PATH.pub unless want is "private"; the first usable one counts.

    WANT is "private", "public" or None for either half.  Where a submitting half is wanted and only the private one is
    there, its submitting half serves.  Failure: why PATH itself (or, where it is missing, PATH.pub) is of no use.  The
    warning is for a file that others can use.
    """
    if not path:
        raise Failure("the key's name is empty", hint="is it that of a variable that is not set?", status=EXIT_USAGE)
    refusal = whole = None
    for name in [path] if want == "private" else [path, path + ".pub"]:
        try:
            text, key, warning = read_key(name) or (None, None, None)
            if key and want == "private" and not key.private:
                raise Failure("%s is a submitting half" % name, "serving needs the private key",
                              "ckeygen made it beside this one: copy that and name it", EXIT_USAGE)
        except Failure as problem:
            refusal = refusal or problem
            continue
        if key and want == "public" and key.private:
            whole = text, warning
        elif key:
            key.name, key.path = path, os.path.abspath(name)    # the program may go to another folder
            return key, warning
    if whole:
        text, warning = whole
        key = parse_key(public_half(text), path)
        key.text = public_half(text)
        return key, warning
    raise refusal or Failure("no key %s" % path, "there is no such file",
                             "make one with ckeygen, or copy it from where it was made", EXIT_USAGE)


def ckeygen(arguments, settings):
    """Makes the key APP, unless it is there, and its submitting half; with -l tells what each FILE is.  Returns the
    status, or raises Failure with one of those above."""
    names = list(arguments)
    if settings.list and names and not settings.stdin:
        return list_keys(names)
    if settings.list and not settings.stdin:
        raise Failure("-l: no FILE given", hint=CKEYGEN_USAGE, status=EXIT_USAGE)
    if settings.list or len(names) not in (1, 2) or not all(names):
        raise Failure("one or two file names are needed", hint=CKEYGEN_USAGE, status=EXIT_USAGE)
    private_path, public_path = (names + [names[0] + ".pub"])[:2]
    if os.path.realpath(private_path) == os.path.realpath(public_path):
        raise Failure("APP and APP.pub are the same file", private_path, status=EXIT_USAGE)
    leave = "it was left as it is; choose another name"
    found = existing_half(private_path, True, "cannot use %s as a private key", leave, EXIT_BAD_PRIVATE)
    if not found and private_path.endswith(".pub"):
        raise Failure(private_path, "that is the name of a submitting half, and this would be the private one",
                      "say: ckeygen %s" % private_path[:-4], EXIT_USAGE)
    replaced = existing_half(public_path, False, "cannot replace %s", leave + ", or move it", EXIT_NO_PUBLIC)
    private = found
    if settings.stdin:
        private = make_keypair(master_from_pieces(standard_input(), new=not found))[0]
    elif not found:
        private = make_keypair(os.urandom(32))[0]
    if found not in (None, private):
        raise Failure("%s exists and is another key" % private_path, "the text given does not lead to it",
                      leave, EXIT_OTHER_KEY)
    if replaced not in (None, public_half(private)):
        raise Failure("cannot replace %s" % public_path, "it is half of another key, perhaps the only copy",
                      "it was left as it is; name another file, or move it away", EXIT_NO_PUBLIC)
    write_halves(private_path, public_path, private, not found)
    made = "%s from %s" % (public_path, private_path) if found else "%s and %s" % (private_path, public_path)
    say("ckeygen", "made %s, key %s" % (made, parse_key(private, private_path).fingerprint))
    say("ckeygen", "both are secret: copy %s to the machines that serve (it can submit as well), "
        "%s to those that only submit" % (private_path, public_path))
    return 0


def list_keys(paths):
    """Prints which half each file is and the fingerprint of its key; the status."""
    status = 0
    for path in paths:
        try:
            key, = load_keys("ckeygen", [path])
            half = "private   " if key.private else "submitting"
            name = path if key.path == os.path.abspath(path) else path + ".pub"
            status = print_out("%s %s %s\n" % (key.fingerprint, half, printable(name))) or status
        except Failure as failure:
            status = status or failure.status
            report_failure("ckeygen", failure, None)
    return status


def standard_input():
    """The bytes of standard input, piece by piece."""
    if sys.stdin is None:
        raise Failure("cannot read the text", "standard input is closed")
    if os.isatty(0):
        say("ckeygen", "type the text, every character of it counts; end it with Enter and Ctrl-D")
    try:
        yield from iter(lambda: os.read(0, 1 << 18), b"")
    except OSError as problem:
        raise Failure("cannot read the text", reason_of(problem)) from None


def existing_half(path, private, what, hint, status):
    """The bytes of that half in PATH, or None where there is no file; Failure where there is something else."""
    try:
        text, key, warning = read_key(path) or (None, None, None)
        if key and key.private != private:
            raise Failure("", "it is a %s half" % ("private" if key.private else "submitting"), status=EXIT_USAGE)
    except Failure as problem:
        raise Failure(what % path, problem.why, hint,
                      EXIT_TEMPORARY if problem.status == EXIT_TEMPORARY else status) from None
    if warning and private:
        say("ckeygen", warning)
    return text


def write_halves(private_path, public_path, private, new):
    """Writes APP.pub, and APP where it is new: both whole or, when something fails, neither (or APP alone).

    A symbolic link is replaced, never written through: in a folder like /tmp, anybody may have put it there.
    """
    files = [(private_path, private, EXIT_NO_PRIVATE)] * new + [(public_path, public_half(private), EXIT_NO_PUBLIC)]
    staged = []
    try:
        for path, text, status in files:
            staged.append(os.path.join(os.path.dirname(path), ".ckeygen-" + os.urandom(8).hex()))
            descriptor = os.open(staged[-1], os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with open(descriptor, "wb") as file:
                os.fchmod(descriptor, 0o600)            # whatever the umask is
                file.write(text)
                file.flush()
                os.fsync(descriptor)
        for (path, _, status), temporary in zip(files, staged):
            if status == EXIT_NO_PRIVATE:
                put_new(temporary, path)
            else:
                os.replace(temporary, path)
    except OSError as problem:
        raise Failure("cannot write %s" % path, reason_of(problem),
                      status=EXIT_TEMPORARY if problem.errno in SHORTAGES else status) from None
    finally:
        for temporary in staged:
            discard(temporary)


def put_new(temporary, path):
    """Gives the finished file its name PATH; OSError if that exists by now, whatever it is."""
    try:
        return os.link(temporary, path)
    except FileExistsError:
        raise
    except (OSError, AttributeError):       # a file system or a Python without hard links: take the name first
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    try:
        os.replace(temporary, path)
    except OSError:
        discard(path)
        raise


def discard(temporary):
    """Removes a file of ours if it is still there."""
    try:
        os.unlink(temporary)
    except OSError:
        pass


# ---------------------------------------------------------------- the loop of calls
#
# What runs in each interpreter of `cservice --python`: takes calls, one after another, and answers each.  Modules that
# this machine has not, or must not take from here, come from the submitter.

HERE_SIDE, THERE_SIDE, NAMESPACE, MISSING = "here", "there", "namespace", "missing"      # where a module comes from
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS",
                    "VECLIB_MAXIMUM_THREADS", "NUMEXPR_NUM_THREADS", "RAYON_NUM_THREADS")
READ_EVERY = 0.001          # seconds between two looks for messages while there are calls
CALL_STATUS_LOOK = 0.25     # seconds between two looks at an interpreter's CallStatus
PRINTED_LOOK = 0.0002       # seconds until the first look whether what a call has printed has been taken
PRINTED_PATIENCE = 5.0      # seconds after which the result does not wait for it: a child may print on and on
ANSWERS_TOGETHER = 0.0005   # seconds between two looks for answers: those of quick calls travel together
NOTHING_UNREAD = bytes(4)   # what FIONREAD says of an empty pipe
DESCRIPTORS_HIGH = 4096     # where descriptors stand that calls are not to find
UNDER_GUARD = """, as a worker runs this script to find its functions
  what calls use must not be defined behind: if __name__ == "__main__":"""
NO_EXECUTOR = """this worker runs calls of Python functions, no commands
  use it with: with cexec.Executor("app.pub") as pool: ..."""

# What PYTHON is given to run: all of this program, as cservice has it, comes by the descriptor PROGRAM.
PROGRAM_START = """\
import marshal, os, sys
from _frozen_importlib_external import MAGIC_NUMBER
data = os.pread(%d, os.fstat(%d).st_size, 0)
path, magic, code, source = marshal.loads(data)
os.close(%d)
module = sys.modules["cexec"] = type(sys)("cexec")
module.__file__ = path
exec(marshal.loads(code) if magic == MAGIC_NUMBER else compile(source, path, "exec", dont_inherit=True), vars(module))
del data, code, source
module.serve_calls()
""" % (PROGRAM, PROGRAM, PROGRAM)

PROGRAM_COMPILER = """\
import marshal, sys
if sys.version_info < (3, 8):
    sys.exit("needs Python 3.8 or later, this is %d.%d" % sys.version_info[:2])
from _frozen_importlib_external import MAGIC_NUMBER
path, source = marshal.loads(sys.stdin.buffer.read())
code = source[16:]
if path.endswith(".pyc") and source[:4] != MAGIC_NUMBER:
    sys.exit("this is Python %d.%d, and cservice runs from %s, which is compiled for another one"
             % (*sys.version_info[:2], path))
if source[:4] != MAGIC_NUMBER:
    code = marshal.dumps(compile(source, path, "exec", dont_inherit=True))
sys.stdout.buffer.write(marshal.dumps((path, MAGIC_NUMBER, code, source)))
"""


def own_path():
    """Of the file that this program was read from; of no file where it came by standard input."""
    return getattr(sys.modules[__name__], "__file__", "")


def read_source(path, loader):
    """The bytes of a file that something was loaded from, or of that member of a zip file."""
    if os.path.isfile(path):
        with open(path, "rb") as file:
            return file.read()
    return loader.get_data(path)


def open_program(command, user):
    """A descriptor of this whole program, compiled by the command's Python, which nobody can write to.  Failure when
    that Python cannot run it."""
    import marshal, subprocess
    path = os.path.realpath(own_path())
    source = read_source(own_path(), sys.modules[__name__].__loader__)
    made = subprocess.run([*command, "-c", PROGRAM_COMPILER], input=marshal.dumps((path, source)),
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=job_environment(user),
                          preexec_fn=user and functools.partial(become_user, user))
    if made.returncode or not made.stdout:
        words = made.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
        raise Failure(" ".join(command), words or "it ended with status %d" % made.returncode,
                      "PYTHON is an interpreter of Python 3.8 or later", EXIT_USAGE)
    return sealed_file(made.stdout)


def sealed_file(data):
    """A descriptor for reading of a file without a name, whose contents nobody can change."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("cexec", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        path = "/proc/self/fd/%d" % fd
    else:
        import tempfile
        fd, path = tempfile.mkstemp("", "cexec-")
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(data)
        os.fchmod(fd, 0o444)
        if hasattr(os, "memfd_create"):
            fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_ALL)
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(fd)
        if not hasattr(os, "memfd_create"):
            os.unlink(path)


def shared_file(size):
    """A descriptor of a file without a name, of so many zero bytes, for memory that processes share."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("cexec")
    else:
        import tempfile
        fd, path = tempfile.mkstemp("", "cexec-")
        os.unlink(path)
    os.ftruncate(fd, size)
    return fd


F_ADD_SEALS, F_SEAL_ALL = 1033, 15      # Linux: no more seals, not shorter, not longer, no writing


class CallAnswers(Source):
    """The answers of an interpreter, at its handler: looked for only so often, so that those of quick calls travel
    together."""
    looked = -math.inf          # when it was last, monotonic seconds

    def _read(self, view):
        now = time.monotonic()
        if now - self.looked < ANSWERS_TOGETHER:
            self.loop.call_later(ANSWERS_TOGETHER, lambda: self.closed or self.ready())
            return None
        self.looked = now
        return super()._read(view)


class CallStatus:
    """One number that an interpreter shows its handler, in memory that both have: when the call in hand has begun,
    monotonic seconds, or 0."""
    FORM = struct.Struct("@d")

    def __init__(self, fd):
        import mmap
        self.memory = mmap.mmap(fd, self.FORM.size)

    def show(self, began):
        self.FORM.pack_into(self.memory, 0, began)

    def read(self):
        return self.FORM.unpack_from(self.memory)[0]


def serve_calls():
    """Runs the calls that come by CALLS; in the interpreter, after PROGRAM_START."""
    if not is_open(CALLS) or not is_open(ANSWERS):
        sys.stderr.write(NO_EXECUTOR + "\n")
        raise SystemExit(EXIT_USAGE)
    CallLoop.current = CallLoop()
    CallLoop.current.run()


class CallLoop:
    """The loop of calls of one interpreter: reads messages, runs calls, and answers them in their order.

    Calls find standard input empty, and as descriptors 1 and 2 pipes of which the submitter prints what comes; the
    descriptors of the loop itself are out of their way.  A message may be read by any thread that imports a module, so
    reading is under a lock.
    """
    current = None                  # the one of this process

    def __init__(self):
        import pickle, termios
        self.pickle = pickle
        self.unread = termios.FIONREAD
        high = min(os.sysconf("SC_OPEN_MAX"), DESCRIPTORS_HIGH) - 16
        self.calls, self.answers = move_descriptor(CALLS, high), move_descriptor(ANSWERS, high)
        os.set_blocking(self.calls, False)
        self.poll, self.idle = select.poll(), select.poll()     # under the lock; of the main thread, without it
        for poll in self.poll, self.idle:
            poll.register(self.calls, select.POLLIN)
        self.status = None
        if is_open(STATUS):
            self.status = CallStatus(STATUS)
            os.close(STATUS)
        self.place = os.environ.get("SERVER_ADDR", "this worker")
        self.pid = os.getpid()
        self.reader = CallReader()
        self.lock = _thread.RLock()
        self.sending = _thread.allocate_lock()
        self.looked = -math.inf         # when messages were read last
        self.ahead = collections.OrderedDict()      # {number: (pickle, buffers), or None for one that was dropped}
        self.replies = {}                           # {number of a question: what the submitter says}
        self.asked = 0
        self.setup = None                           # what the submitter said first
        self.input_over = False
        self.script = None                          # the ScriptRun, where the submitter has a script
        self.enough = False                         # this interpreter wants no more calls
        self.cpu_limit = math.inf
        self.modules = ModuleFinder(self)
        self._open_standard(high)

    def _open_standard(self, high):
        """Standard input is empty; the others take text of any kind, and are remembered as they are."""
        null = os.open(os.devnull, os.O_RDWR)
        for fd in range(3):
            if fd == 0 or not is_open(fd):
                os.dup2(null, fd)
        if null > 2:
            os.close(null)
        self.kept = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, high) for fd in range(3)]
        self.printed = [fd for fd in self.kept[1:] if unread_bytes(fd) is not None]
        self.standard = select.poll()       # finds those that are closed
        for fd in range(3):
            self.standard.register(fd, 0)
        self._open_files()

    def _open_files(self):
        """sys.stdin and its kin anew, where a call has closed them."""
        if is_closed(sys.stdin):
            sys.stdin = sys.__stdin__ = open(0, closefd=False)
        sys.stdout = sys.__stdout__ = self._open_output(sys.stdout, 1)
        sys.stderr = sys.__stderr__ = self._open_output(sys.stderr, 2)

    @staticmethod
    def _open_output(file, fd):
        if is_closed(file):
            file = open(fd, "w", closefd=False)
        if isinstance(file, io.TextIOWrapper):
            file.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)
        return file

    # -- messages
    def run(self):
        sys.path[:] = [folder for folder in sys.path if folder]     # this worker's own folder is nobody's business
        sys.meta_path.insert(0, self.modules)
        sys.path_hooks.append(self.modules.folder)
        os.register_at_fork(after_in_child=self._forked)
        try:
            import resource
            limit = resource.getrlimit(resource.RLIMIT_CPU)[0]
            self.cpu_limit = math.inf if limit == resource.RLIM_INFINITY else limit
        except ImportError:
            pass        # then the limit ends it under a call
        while True:
            if not self.ahead or time.monotonic() - self.looked > READ_EVERY:
                self._read()
            if self.setup is None and not self.input_over:
                self._idle()
            elif self.ahead:
                number, message = self.ahead.popitem(last=False)
                if message is None:
                    self._send(DROPPED, number)
                else:
                    self._call(number, *message)
                del message
            elif self.input_over:
                return
            else:       # threads that calls have left behind may read a message as well
                self._idle(100 if _thread._count() else None)

    def _idle(self, patience=None):
        """Waits for a message, so many milliseconds."""
        try:
            self.idle.poll(patience)
        except BaseException as error:      # of a signal or a timer that a call has left behind: nobody's fault now
            report_in_thread(error)

    def _read(self, patience=0):
        """Takes what messages there are now, or come within so many milliseconds; None waits."""
        with self.lock:
            self.looked = time.monotonic()
            while not self.input_over and self.poll.poll(patience):
                data = os.read(self.calls, BUFFER)
                self.input_over = not data
                for kind, number, _, message, buffers in self.reader.read(data):
                    self.TAKEN[kind](self, number, message, buffers)
                patience = 0

    def _take_setup(self, number, message, buffers):
        self.setup = self.pickle.loads(message)
        self.modules.shadowed = frozenset(self.setup["shadowed"])
        if self.setup["main"]:
            sys.argv[:] = self.setup["argv"]
            self.script = ScriptRun(self.modules, self.setup["main"], self.place)
        failed = self._run_initializer()
        self._flush()
        self._send(READY, 0, encode_ready(sys.version_info[:2], failed))

    def _take_call(self, number, message, buffers):
        self.ahead[number] = message, buffers

    def _take_drop(self, number, message, buffers):
        if number in self.ahead:
            self.ahead[number] = None

    def _take_reply(self, number, message, buffers):
        self.replies[number] = self.pickle.loads(message)

    TAKEN = {SETUP: _take_setup, CALL: _take_call, DROP: _take_drop, REPLY: _take_reply}

    def _run_initializer(self):
        """The traceback and the words of what it raises, or nothing."""
        if self.setup["initializer"] is not None:
            try:
                initializer, arguments = self.pickle.loads(self.setup["initializer"], buffers=self.setup["buffers"])
                initializer(*arguments)
            except BaseException as error:
                return self._describe(error)[:2]
        return ()

    def _send(self, kind, number=0, data=b"", buffers=(), microseconds=0):
        parts = encode_call(kind, number, data, buffers, microseconds)
        try:
            with self.sending:
                for part in parts:
                    size = os.write(self.answers, part)
                    while size < len(part):
                        part = memoryview(part)[size:]
                        size = os.write(self.answers, part)
        except OSError:
            os._exit(EXIT_TEMPORARY)        # nobody is there any more, or a call has closed the descriptor

    def ask(self, kind, name, more):
        """What the submitter says to a question (see SourceLibrary); None at its end."""
        with self.lock:
            if os.getpid() != self.pid:
                return None         # a child of a call has no word with the submitter
            self.asked += 1
            number = self.asked
            self._send(WANTED, number, encode_question(kind, name, more))
            while number not in self.replies and not self.input_over:
                self._read(None)
            return self.replies.pop(number, None)

    # -- a call
    def _call(self, number, message, buffers):
        began = time.monotonic()
        if self.status:
            self.status.show(began)
        kind, data, out = RETURNED, b"", []
        try:
            function, arguments, named = self.pickle.loads(message, buffers=buffers)
            del message, buffers
            value = function(*arguments, **named)
            data, out = self._pickled(dump, value)
        except BaseException as error:
            kind, out = RAISED, []
            data = self.pickle.dumps(self._describe(error), 4)
        if os.getpid() != self.pid:
            os._exit(0)             # a child that the call has forked and let come back
        function = arguments = named = value = None
        self._flush()
        seconds = time.monotonic() - began
        if seconds > CALL_PAUSE:
            self._give_back()
        self._send(kind, number, data, out, int(seconds * 1e6))
        if self.status:
            self.status.show(0.0)
        if self.cpu_limit < math.inf and not self.enough and time.process_time() > self.cpu_limit / 2:
            self.enough = True
            self._send(ENOUGH)

    def _give_back(self):
        """Calls that have come so far are not run; from the last one on, as the submitter puts each in front."""
        self._read()
        while self.ahead:
            self._send(DROPPED, self.ahead.popitem()[0])

    def _pickled(self, way, value):
        """way(dumps, value), by cloudpickle where pickle refuses it and code has come so from the same Python: what
        the prompt or a notebook has defined goes back as it came."""
        try:
            return way(self.pickle.dumps, value)
        except Exception:
            by_value = sys.modules.get("cloudpickle")
            if by_value is None or self.setup["python"] != sys.version_info[:2]:
                raise
        return way(script_dumps(by_value, self.script.loader.source) if self.script else by_value.dumps, value)

    def _describe(self, error):
        """(traceback, words, pickle or None) of what a call raised, whatever has become of this interpreter."""
        try:
            self.modules.explain(error)
            import linecache, traceback
            self.modules.show_lines(linecache)
            trace = error.__traceback__ and error.__traceback__.tb_next       # from the call's own part on
            text = "".join(traceback.format_exception(type(error), error, trace))
        except Exception as problem:
            text = "the traceback cannot be told: %s\n" % words_of(problem)
        try:
            data = self._pickled(lambda dumps, value: dumps(value, protocol=5), error)
            self.pickle.loads(data)
        except BaseException:
            data = None
        return "(on %s)\n%s" % (self.place, text), words_of(error), data

    def _flush(self):
        """What calls have printed has left before their results do, and before the next call begins, as the submitter
        is to know which one that is; what they have done to the standard descriptors is undone."""
        damaged = is_closed(sys.stdin)
        for file in sys.stdout, sys.stderr:
            try:
                file.flush()
            except Exception:
                damaged = True      # it is closed, or the call's own
        if damaged or self.standard.poll(0):
            self._restore()
        wait, until = PRINTED_LOOK, 0.0
        while self._has_unread():
            until = until or time.monotonic() + PRINTED_PATIENCE
            if time.monotonic() > until:
                break
            time.sleep(wait)
            wait = min(2 * wait, 0.02)

    def _has_unread(self):
        """Whether something that was printed has not been taken yet."""
        try:
            for fd in self.printed:
                if fcntl.ioctl(fd, self.unread, NOTHING_UNREAD) != NOTHING_UNREAD:
                    return True
        except OSError:
            pass        # a call has closed even these
        return False

    def _restore(self):
        for fd, kept in enumerate(self.kept):
            if not is_open(fd):
                os.dup2(kept, fd)
        self._open_files()

    def _forked(self):
        """In a child that a call has forked: it keeps away from what is its parent's, and keeps none of it open."""
        null = os.open(os.devnull, os.O_RDWR)
        for fd in self.calls, self.answers:
            try:
                os.dup2(null, fd, inheritable=False)
            except OSError:
                pass        # a call has closed it
        os.close(null)
        self.lock, self.sending = _thread.RLock(), _thread.allocate_lock()


def is_closed(file):
    """Whether what sys.stdout and its kin are cannot be used any more; a program's own kind of file may not say."""
    return file is None or getattr(file, "closed", False)


def move_descriptor(fd, least):
    """Moves a descriptor to a number that is free from `least` on; children do not inherit it."""
    moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, least)
    os.close(fd)
    return moved


def dump(dumps, value):
    """(pickle, [buffer]) of the value, by the dumps of pickle or cloudpickle."""
    buffers = []

    def take(buffer):
        """Whether it goes into the pickle."""
        view = buffer.raw()
        if len(view) < BUFFER_LEAST or len(buffers) == BUFFERS_MAX:
            return True
        buffers.append(view)
        return False
    return dumps(value, protocol=5, buffer_callback=take), buffers


@functools.lru_cache(maxsize=None)
def script_dumps(cloudpickle, source):
    """The dumps of cloudpickle for who has a script: what that defines where it is run as a module goes by its name, as
    with pickle, and its other functions use the variables of the script there, so that all share one state.  Variables
    that it has only here go along."""
    import types
    if not hasattr(cloudpickle, "Pickler"):
        return cloudpickle.dumps        # of an old version
    defined = names_in_script(source)

    class ScriptPickler(cloudpickle.Pickler):
        def reducer_override(self, value):
            script = sys.modules["__main__"]
            if isinstance(value, (type, types.FunctionType)) and value.__module__ == script.__name__:
                path = value.__qualname__
                if path.partition(".")[0] in defined and attribute_of(script, path) is value:
                    return NotImplemented
                if isinstance(value, types.FunctionType) and value.__globals__ is vars(script):
                    return reduce_function(value, defined)
            return super().reducer_override(value)

    def dumps(value, protocol, buffer_callback=None):
        file = io.BytesIO()
        ScriptPickler(file, protocol, buffer_callback=buffer_callback).dump(value)
        return file.getvalue()
    return dumps


def names_in_script(source):
    """The names that the script defines where it is run as a module: not what is behind its guard."""
    import ast, dis
    tree = ast.parse(source)
    tree.body = [each for each in tree.body if not isinstance(each, ast.If) or "__name__" not in ast.dump(each.test)]
    code = compile(tree, "script", "exec")
    return {*MODULE_NAMES, *(each.argval for each in dis.get_instructions(code) if each.opname == "STORE_NAME")}


def attribute_of(value, path):
    try:
        return operator.attrgetter(path)(value)
    except AttributeError:
        return None


MODULE_NAMES = ("__name__", "__doc__", "__package__", "__loader__", "__spec__", "__file__", "__builtins__")
FUNCTION_PARTS = ("__name__", "__qualname__", "__module__", "__doc__", "__dict__", "__defaults__", "__kwdefaults__",
                  "__annotations__")


def reduce_function(function, defined):
    """How a function of the script is pickled: its state comes after it, since it may refer to the function."""
    import marshal
    cells, variables = function.__closure__ or (), function.__globals__
    lent = global_names(function.__code__).intersection(variables).difference(defined)
    return (script_function, (marshal.dumps(function.__code__), len(cells)),
            ([cell_values(cell) for cell in cells], {part: getattr(function, part) for part in FUNCTION_PARTS},
             {name: variables[name] for name in lent}), None, None, complete_function)


def global_names(code):
    """The names of variables of its module that the code uses."""
    import dis
    names = {each.argval for each in dis.get_instructions(code) if each.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return names.union(*(global_names(const) for const in code.co_consts if isinstance(const, type(code))))


def cell_values(cell):
    """What it holds: one value, or none yet."""
    try:
        return [cell.cell_contents]
    except ValueError:
        return []


def script_function(code, cells):
    import marshal, types
    import cloudpickle          # by which what the function gives may go back
    if CallLoop.current:
        CallLoop.current.script.run()
    return types.FunctionType(marshal.loads(code), vars(sys.modules["__main__"]), None, None,
                              tuple(types.CellType() for _ in range(cells)) or None)


def complete_function(function, state):
    cells, parts, lent = state
    if CallLoop.current:
        function.__globals__.update(lent)
    for cell, values in zip(function.__closure__ or (), cells):
        for value in values:
            cell.cell_contents = value
    for part, value in parts.items():
        setattr(function, part, value)


class LongPickle:
    """A long pickle as a file for an Unpickler, without a copy of it."""

    def __init__(self, view):
        self.view = memoryview(view)
        self.at = 0

    def read(self, size):
        data = bytes(self.view[self.at:self.at + size])
        self.at += len(data)
        return data

    def readinto(self, target):
        part = self.view[self.at:self.at + len(target)]
        target[:len(part)] = part
        self.at += len(part)
        return len(part)

    def readline(self):
        raise EOFError("a pickle of an old protocol")


def words_of(error):
    """What an exception is and says, whatever its own methods do."""
    try:
        text = str(error)
    except BaseException:
        text = ""
    return type(error).__name__ + (": " + text if text else "")


ScriptState = enum.Enum("ScriptState", "WAITING RUNS OVER")


class ModuleFinder:
    """Finds modules at the submitter, for the import system of an interpreter.

    What counts for a module that is not below another one counts for all below it: it comes from here, or wholly from
    there.  Below a namespace package each one counts by itself.
    """

    def __init__(self, loop):
        self.loop = loop
        self.shadowed = frozenset()     # modules of the standard library that the submitter has others for
        self.sides = {}                 # {name: where it comes from}
        self.absent = {}                # {name: why it cannot come}
        self.along = {}                 # {name: answer} of modules that have come with their package
        self.loaders = {}               # {file name at the submitter: SentLoader}
        self.standard = standard_names()

    def find_spec(self, name, path=None, target=None):
        top, parent = name.partition(".")[0], name.rpartition(".")[0]
        if top == "cexec" or top in self.standard and top not in self.shadowed or name in self.absent:
            return None
        side = self.sides.get(parent, HERE_SIDE) if parent else NAMESPACE
        if side is HERE_SIDE:
            self.sides[name] = HERE_SIDE
            return None
        local = self._local(name, path) if side is NAMESPACE else None
        answer = self.along.pop(name, None) or self.loop.ask("module", name, "here" if local else "")
        if answer is None:
            return None
        side, origin, is_package, source, words, *along = answer
        for each in along:
            self.along.update(each)
        if side is not None:
            self.sides[name] = {each: each for each in (HERE_SIDE, THERE_SIDE, NAMESPACE)}.get(side, MISSING)
        return self._spec(name, side, origin, is_package, source, words, local)

    def _spec(self, name, side, origin, is_package, source, words, local):
        from _frozen_importlib import ModuleSpec
        if side == THERE_SIDE:
            loader = self.loaders[origin] = SentLoader(self, name, origin, is_package, source)
            spec = ModuleSpec(name, loader, origin=origin, is_package=is_package)
            spec.has_location = True
            if is_package:      # no folder of this machine
                spec.submodule_search_locations = ["cexec:" + os.path.dirname(origin)]
            return spec
        if side == NAMESPACE:
            spec = ModuleSpec(name, None, is_package=True)
            spec.submodule_search_locations = list(local.submodule_search_locations or ()) if local else []
            spec.submodule_search_locations.append("cexec:" + name)
            return spec
        if side == MISSING and local is None:
            self.absent[name] = words
        return None

    def _local(self, name, path):
        from _frozen_importlib_external import PathFinder
        return PathFinder.find_spec(name, path)

    def folder(self, path):
        """A hook of sys.path_hooks."""
        kind, _, folder = path.partition(":")
        loader = self.loaders.get(os.path.join(folder, "__init__.py"))
        if kind != "cexec" or loader is None:
            raise ImportError("not the folder of a package that was sent", path=path)
        return SentFolder(loader)

    def explain(self, error):
        """An error, and what it came from, says why a module cannot come from the submitter, or why the script has no
        such name."""
        told = set()
        while error is not None and id(error) not in told:
            told.add(id(error))
            name = error.name if isinstance(error, ModuleNotFoundError) else None
            why = self.absent.get(name)
            if why and str(error) == "No module named %r" % name:
                error.msg = "No module named %r on worker %s%s" % (name, self.loop.place, why)
                error.args = error.msg,
            elif type(error) is AttributeError and self.loop.script and repr(self.loop.script.module) in str(error):
                error.args = str(error) + UNDER_GUARD,
            error = error.__cause__ or error.__context__

    def show_lines(self, linecache):
        """Makes tracebacks show the lines of sources that are not on this machine."""
        for origin, loader in self.loaders.items():
            if origin not in linecache.cache:
                source = loader.get_source(loader.name)
                linecache.cache[origin] = len(source), None, source.splitlines(True), origin


class ScriptRun:
    """The submitter's script in an interpreter: its __main__, and __mp_main__, is a module that is run, once, when
    something of it is first wanted, as multiprocessing's spawn would run it."""

    def __init__(self, finder, told, place):
        from _frozen_importlib import ModuleSpec
        run = self

        class Script(type(sys)):
            def __getattr__(self, name):
                """Of what is not there, or not yet."""
                if not name.startswith("__"):
                    run.run()
                if name not in vars(self):
                    raise AttributeError("module %r has no attribute %r" % (self.__name__, name))
                return vars(self)[name]

        self.finder = finder
        self.place = place
        self.state = ScriptState.WAITING
        self.failed = None              # words
        self.loader = finder.loaders[told["file"]] = SentLoader(finder, told["name"], told["file"], False,
                                                                told["source"])
        self.module = module = Script("__mp_main__")
        module.__file__, module.__package__, module.__loader__ = told["file"], told["package"], self.loader
        # A main module of this name is none that multiprocessing's children would look for, in a file of this machine.
        module.__spec__ = ModuleSpec(".".join(filter(None, [told["package"], "__main__"])), self.loader,
                                     origin=told["file"])
        sys.modules["__main__"] = sys.modules["__mp_main__"] = module

    def run(self):
        """CallError when it fails, and for all times that follow."""
        if self.failed:
            raise CallError(self.failed)
        if self.state is not ScriptState.WAITING:
            return
        self.state, before = ScriptState.RUNS, dict(vars(self.module))
        try:
            self.loader.exec_module(self.module)
        except BaseException as error:
            self.finder.explain(error)
            self.failed = "%s could not be run on %s, as it has to be for its functions: %s" % (
                self.module.__file__, self.place, words_of(error))
            vars(self.module).clear()
            vars(self.module).update(before)
            raise CallError(self.failed) from error
        finally:
            self.state = ScriptState.OVER


def standard_names():
    """The modules of the standard library that are not below others."""
    names = set(sys.builtin_module_names)
    if hasattr(sys, "stdlib_module_names"):
        return names.union(sys.stdlib_module_names)
    folder = os.path.dirname(os.__file__)
    for each in folder, os.path.join(folder, "lib-dynload"):
        if os.path.isdir(each):
            names.update(entry.partition(".")[0] for entry in os.listdir(each))
    return names - {"site-packages", "dist-packages"}


class SentLoader:
    """Loads one module from its source, which the submitter has sent; asks for data files of a package."""

    def __init__(self, finder, name, origin, is_package, source):
        self.finder = finder
        self.name = name
        self.origin = origin
        self.package = is_package
        self.source = source

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        exec(self.get_code(module.__name__), module.__dict__)

    def get_code(self, name):
        return compile(self.source, self.origin, "exec", dont_inherit=True)

    def get_source(self, name):
        from importlib.util import decode_source
        return decode_source(self.source)

    def get_filename(self, name):
        return self.origin

    def is_package(self, name):
        return self.package

    def get_data(self, path):
        """A file of the package that this module is, or is in."""
        package = self.name if self.package else self.name.rpartition(".")[0]
        folder = os.path.dirname(self.origin) + "/"
        if path == self.origin:
            return self.source
        if not path.startswith(folder):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return self.read(package, path[len(folder):])

    def read(self, package, name):
        data = self.finder.loop.ask("data", package, name)
        if not isinstance(data, bytes):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        return data

    def names(self, package, name):
        """{name: whether it is a folder} of what is in a folder of the package; None where there is none."""
        return self.finder.loop.ask("folder", package, name)

    def get_resource_reader(self, name):
        return SentResources(self, name) if self.package else None


class SentFolder:
    """What pkgutil finds in the folder of a package that the submitter has sent."""

    def __init__(self, loader):
        self.loader = loader

    def find_spec(self, name, target=None):
        return None             # ModuleFinder, which was asked before, has not found it

    def iter_modules(self, prefix=""):
        package = self.loader.name
        for name, is_folder in sorted((self.loader.names(package, "") or {}).items()):
            if is_folder and "__init__.py" in (self.loader.names(package, name) or ()):
                yield prefix + name, True
            elif not is_folder and name.endswith(".py") and name != "__init__.py":
                yield prefix + name[:-3], False


class SentResources:
    """What importlib.resources reads of a package that the submitter has sent: the reader, and each folder and file."""

    def __init__(self, loader, package, path=""):
        self.loader = loader
        self.package = package
        self.path = path

    name = property(lambda self: self.path.rpartition("/")[2] or self.package.rpartition(".")[2])

    def files(self):
        return self

    def joinpath(self, *names):
        return SentResources(self.loader, self.package, "/".join(filter(None, [self.path, *map(str, names)])))

    __truediv__ = joinpath

    def iterdir(self):
        return (self.joinpath(name) for name in self.loader.names(self.package, self.path) or ())

    def is_dir(self):
        return self.loader.names(self.package, self.path) is not None

    def is_file(self):
        folder, _, name = self.path.rpartition("/")
        return (self.loader.names(self.package, folder) or {}).get(name) is False

    def read_bytes(self):
        return self.loader.read(self.package, self.path)

    def read_text(self, encoding="utf-8", errors="strict"):
        return self.read_bytes().decode(encoding or "utf-8", errors)

    def open(self, mode="r", *, encoding="utf-8", errors=None, newline=None, **more):
        file = io.BytesIO(self.read_bytes())
        return file if "b" in mode else io.TextIOWrapper(file, encoding, errors, newline)

    # -- the reader of older versions of importlib.resources
    def open_resource(self, name):
        return io.BytesIO(self.loader.read(self.package, name))

    def resource_path(self, name):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)

    def is_resource(self, name):
        return self.joinpath(name).is_file()

    def contents(self):
        return iter(self.loader.names(self.package, "") or ())


# ---------------------------------------------------------------- the Python API
#
# What another program imports.  The import alone has no effect.

__all__ = ["Executor", "Room", "Result", "Process", "Failure", "JobError", "JobRefused", "CallError",
           "InterpreterDied"]


class Result(collections.namedtuple("Result", "status stdout stderr worker seconds")):
    """How one job ended.

    status: its exit status, or minus the number of the signal that it died of, as in subprocess.
    stdout, stderr: bytes.  worker: the address it ran at.  seconds: from the call to the end.
    returncode: the status, as subprocess calls it.
    """
    __slots__ = ()
    returncode = property(lambda self: self.status)


class JobError(Exception):
    """A job ended with another status than 0 and `check` was set.  result: its Result; returncode, stdout and stderr
    are that one's, as in subprocess.CalledProcessError."""

    def __init__(self, result):
        super().__init__(result)
        self.result = result
        self.returncode, self.stdout, self.stderr = result.status, result.stdout, result.stderr

    def __str__(self):
        return "the job ended with status %d on %s" % (self.result.status, self.result.worker)


class Room:
    """The workers that serve one key, for a program's jobs.

        with cexec.Room("app.pub") as room:
            print(room.run(b"hello").stdout)

    key: the path of APP.pub, or APP where APP.pub lies beside it, as for cexec.
    jobs: how many may run at once, 256 at most.
    settings: those of cexec by their names in lower case without CEXEC_, as group="127.255.255.255" or
    timeout_accept=30; what is not given, or None, comes from the environment, as for cexec.

    A Room may be used from several threads, but not by a forked child, which makes one of its own.  The first job
    starts a thread that does all the work; close(), or the end of `with`, ends it and every job.  Connections to
    workers are kept for a second, so that many small jobs are cheap.

    An input is bytes, an open file with a descriptor, which is read from its offset on, or the path (str or PathLike)
    of a file.  A regular file is not read before the job needs it, and the offset stays where it is; it may be closed
    after the call.  While one changes its job is run again, and is a Failure if it does not hold still.  names: {NAME:
    VALUE}, which the job finds as PEER_NAME.  check: whether a job that ends with another status than 0 is a JobError.
    timeout: seconds from the call after which a job is ended, for which subprocess.TimeoutExpired is raised.

    What a job writes is held until it has ended.  A worker that is lost costs time and no result: its jobs run again
    elsewhere (`retries` times), and so does what they do besides.  Failure is for what the cluster could not do: nobody
    answered, workers were lost, the Room was closed; and for a key or a setting that is of no use.
    """

    def __init__(self, key, jobs=256, **settings):
        key, warning = load_key(os.fsdecode(key), "public")
        if warning:
            import warnings
            warnings.warn(warning, stacklevel=2)
        self._thread = PoolThread(key, room_settings(settings), max(1, min(256, jobs)))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def run(self, input=b"", names={}, check=False, timeout=None):
        """Runs one job and returns its Result."""
        from queue import SimpleQueue
        self._thread.check_wait()
        ended = SimpleQueue()
        job = HeldJob(self._thread, input, names, check, timeout, ended.put)
        try:
            ended.get()
        except BaseException:
            job.cancel()
            raise
        if job.error:
            raise job.error
        return job.result

    def submit(self, input=b"", names={}, check=False, timeout=None):
        """Starts one job; returns a concurrent.futures.Future of its Result.  Its cancel() ends a running job too; what
        its callbacks do holds up the other jobs, so they cannot wait for one.  asyncio.wrap_future() makes it one to
        await."""
        from concurrent.futures import Future
        future = Future()

        def settle(job):
            if future.set_running_or_notify_cancel():       # unless it was cancelled
                (future.set_exception if job.error else future.set_result)(job.error or job.result)
        job = HeldJob(self._thread, input, names, check, timeout, settle)
        future.add_done_callback(lambda future: future.cancelled() and job.cancel())
        return future

    def map(self, inputs, names={}, check=False, timeout=None):
        """Yields the Results of one job for each input, in the order of the inputs, each as soon as it is there.  A
        thread takes the inputs as slots come free: a few more than there are slots.  A job's error is raised in its
        turn, that of an input at once; then, or when the generator is closed, the other jobs end."""
        return RoomMap(self._thread, inputs, names, check, timeout).results()

    def popen(self, names={}):
        """Starts one job whose standard input, output and error are pipes of this program; returns a Process."""
        return Process(self._thread, names)

    def close(self):
        """Ends all jobs, the connections and the thread.  May be called again."""
        self._thread.close()

    def __del__(self):
        thread = getattr(self, "_thread", None)
        if thread and thread.is_open() and not sys.is_finalizing():     # then nothing can be imported any more
            import warnings
            warnings.warn("unclosed %r" % self, ResourceWarning, source=self)
            thread.close(wait=False)


class MappedJob(BatchJob):
    """A job of Room.map."""
    __slots__ = ("held",)

    def __init__(self):
        super().__init__()
        self.held = None            # its HeldJob


class RoomMap:
    """One Room.map: a thread of its own takes the inputs, the Room's thread says which jobs have ended, and that of the
    caller takes the results; `news` tells each what the others did."""

    def __init__(self, thread, inputs, names, check, timeout):
        import threading
        self.thread = thread
        self.inputs = iter(inputs)
        self.make_job = functools.partial(HeldJob, thread, names=names, check=check, timeout=timeout)
        self.batch = Batch(0)
        self.failure = None                     # what an input raised
        self.closed = False
        self.news = threading.Condition()
        self.taker = threading.Thread(target=self._take, name="cexec.Room.map", daemon=True)
        self.slots_changed()

    def slots_changed(self):
        with self.news:
            self.batch.most = self.batch.undelivered = self.thread.slots + 2 * AHEAD
            self.news.notify_all()

    def results(self):
        self.thread.check_wait()
        self.thread.maps.add(self)
        self.slots_changed()
        self.taker.start()
        try:
            while True:
                with self.news:
                    self.news.wait_for(lambda: self.batch.has_ready() or self.failure or self.batch.is_over())
                    held = next((job.held for job in self.batch.deliverable()), None)
                    self.news.notify_all()
                if not held:
                    break
                if held.error:
                    raise held.error
                yield held.result
            if self.failure:
                raise self.failure
        finally:
            self._close()

    def _take(self):
        try:
            while self._wants_input():
                input = next(self.inputs, NO_MORE)
                if input is NO_MORE or self.closed:
                    break
                job = MappedJob()
                with self.news:
                    self.batch.add(job)
                    self.batch.start(job, self)
                job.held = self.make_job(input, on_end=functools.partial(self._ended, job))
                if self.closed:
                    job.held.cancel()
        except BaseException as error:
            self.failure = error
        with self.news:
            self.batch.complete()
            self.news.notify_all()

    def _wants_input(self):
        with self.news:
            self.news.wait_for(lambda: self.closed or self.batch.wants_job())
        return not self.closed

    def _ended(self, job, held):
        with self.news:
            job.held = held
            job.runs.clear()
            self.batch.settle(job)
            self.news.notify_all()

    def _close(self):
        """Ends the jobs that are left."""
        self.thread.maps.discard(self)
        with self.news:
            self.closed = True
            self.news.notify_all()
            left = [job.held for job in self.batch.unfinished()]
        for held in filter(None, left):
            held.cancel()


class PoolThread:
    """The thread that does the work of one Room: a Pool and its Loop.  It starts with the first call.

    Whatever goes wrong in it ends the jobs there are with a Failure, and the thread; the next call starts another one.
    """

    def __init__(self, key, settings, most, on_ready=None):
        import threading
        self.on_ready = on_ready        # called in the thread when there may be a slot for one more job
        self.key = key
        self.settings = settings
        self.most = most
        self.lock = threading.RLock()   # the collector of garbage may close a Room at any moment
        self.thread = None
        self.loop = None
        self.pool = None
        self.submissions = set()        # those without an end
        self.maps = set()               # RoomMaps, which take more inputs where there are more slots
        self.slots = 0                  # connections there are
        self.budget = Budget()
        self.pid = os.getpid()
        self.closed = False

    def is_open(self):
        return self.thread is not None and not self.closed and self.pid == os.getpid()

    def check_wait(self):
        """Failure where the caller is the thread itself, and would wait for ever for what only that can bring."""
        thread = self.thread
        if thread and thread.ident == _thread.get_ident():
            raise Failure("this Room", "what a Future calls at its end cannot wait for a job: all of them would stop",
                          "use submit() there, or another thread")

    def call(self, function, submission=None):
        """Calls it in the thread; Failure where that cannot be.  submission: the one that begins with it; when the
        thread ends before that does, it fails."""
        if self.pid != os.getpid():
            raise Failure("this Room", "it belongs to another process", "a forked child makes a Room of its own")
        with self.lock:
            if self.closed:
                raise Failure("this Room", "it is closed")
            if not self.thread:
                self._begin()
            if submission:
                self.submissions.add(submission)
            if submission and len(self.pool.queue) >= AHEAD:
                self.loop.calls.append(function)        # others wait as well, so the loop looks soon
            else:
                self.loop.call_soon_threadsafe(function)

    def _begin(self):
        import threading
        try:
            loop = Loop()
        except OSError as error:
            raise Failure("this Room", reason_of(error)) from None
        pool = Pool(loop, self.key, self.settings, self.most, keep=True, on_ready=self._count_slots)
        thread = threading.Thread(target=self._run, args=(loop, pool), name="cexec.Room", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            loop.close()
            raise Failure("this Room", error) from None
        self.thread, self.loop, self.pool = thread, loop, pool

    def _count_slots(self):
        if self.on_ready:
            self.on_ready()
        before, self.slots = self.slots, len(self.pool.connections)
        if self.slots != before:
            for each in list(self.maps):
                each.slots_changed()

    def _run(self, loop, pool):
        cause = None
        try:
            loop.run()
            failure = Failure("the job", "its Room was closed")
        except BaseException as error:
            cause, failure = error, failure_of(error)
        with self.lock:
            self.thread, left, self.submissions = None, self.submissions, set()
        pool.close()
        for submission in left:
            each = Failure(*failure.args)
            each.__cause__ = cause
            submission.on_done(None, each, submission)
        loop.close()

    def close(self, wait=True):
        """Ends every job that is left with a Failure, and the thread.  May be called again."""
        if self.pid != os.getpid():
            return              # a lock of the parent may be held for ever here
        with self.lock:
            self.closed, thread, loop = True, self.thread, self.loop
        if thread:
            loop.call_soon_threadsafe(loop.stop)
            if wait and loop.thread != _thread.get_ident():
                thread.join()


def room_settings(given):
    """The Settings of a Room from its keyword arguments and the environment."""
    environment = dict(os.environ)
    known = {option[2:].replace("-", "_"): setting for setting in SETTINGS if CEXEC in setting.tools
             for option in setting.options}
    for name, value in given.items():
        if name not in known:
            raise TypeError("a Room has no setting %r; it has: %s" % (name, ", ".join(sorted(known))))
        if isinstance(value, (list, tuple)):
            value = ",".join(map(str, value))
        if value is not None:
            environment[known[name].names[0]] = str(int(value) if isinstance(value, bool) else value)
    return settings_here(read_settings(CEXEC, [], environment)[0])


def job_names(names):
    """[(name, value)] as bytes; ValueError for what cannot be an environment variable."""
    pairs = [(os.fsencode(name), os.fsencode(value if isinstance(value, bytes) else str(value)))
             for name, value in dict(names).items()]
    for name, value in pairs:
        if not is_name(name) or b"\0" in value:
            raise ValueError("not a name and value of an environment variable: %r" % name)
    return pairs


def returncode(report):
    """The status as subprocess gives it."""
    return -SIGNAL_NAMES.get(report.name, report.number) if report.signalled else report.number


def job_input(input):
    """The HeldInput of what a user gives as input; end() closes it."""
    if isinstance(input, (str, os.PathLike)):
        return HeldInput(os.fsdecode(input))
    if not hasattr(input, "fileno"):
        return HeldInput(bytes(memoryview(input)))
    fd = input.fileno()
    if stream_kind(fd) is not REGULAR:
        return HeldInput(b"".join(iter(lambda: os.read(fd, BUFFER), b"")))
    return HeldInput(os.dup(fd), os.lseek(fd, 0, os.SEEK_CUR), given=True)


class HeldJob:
    """One job whose output is held: made in the caller's thread, run in the Room's, where on_end(job) is called."""

    def __init__(self, thread, input, names, check, timeout, on_end):
        self.thread = thread
        self.check = check
        self.timeout = timeout
        self.on_end = on_end
        self.began = time.monotonic()
        self.expires = math.inf if timeout is None else self.began + timeout    # monotonic seconds
        if math.isnan(self.expires):
            raise ValueError("timeout is not a number of seconds: %r" % timeout)
        self.timer = NO_TIMER
        self.result = None
        self.error = None
        self.over = False
        self.unsteady = 0               # runs during which the input has changed
        self.names = job_names(names)
        self.source = job_input(input)
        try:
            self.streams = HeldStreams(self.source, thread.budget, self.began)
            self.submission = self._make_submission()
            thread.call(self._start, self.submission)
        except Failure:
            self.source.end()
            raise

    def _make_submission(self):
        return Submission(self.streams, self.names, self.thread.settings.retries, self._done)

    def _start(self):
        if self.expires < math.inf:
            self.timer = self.thread.loop.call_at(self.expires, self._expired)
        self.thread.pool.submit(self.submission)

    def _done(self, status, failure, submission):
        if self.source.has_changed() and not isinstance(failure, NoWorker) and self.thread.is_open():
            self.unsteady += 1
            if self.unsteady < STEADY_TRIES:
                self.submission = self._make_submission()
                self.thread.submissions.discard(submission)
                self.thread.submissions.add(self.submission)
                return self.thread.pool.submit(self.submission)
            failure = Failure("the job", "its input changes while it is read")
        self.error = failure
        if not failure:
            self.result = Result(returncode(submission.report), bytes(self.streams.output), bytes(self.streams.errors),
                                 submission.worker, time.monotonic() - self.began)
            if self.check and self.result.status:
                self.error = JobError(self.result)
        self._end()

    def _expired(self):
        import subprocess
        self.error = subprocess.TimeoutExpired(self.thread.key.name, self.timeout, bytes(self.streams.output),
                                               bytes(self.streams.errors))
        self.thread.pool.cancel(self.submission)
        self._end()

    def _end(self):
        self.over = True
        self.thread.submissions.discard(self.submission)
        self.timer.cancel()
        self.streams.close()
        self.source.end()
        self.thread.budget.pay()
        self.on_end(self)

    def cancel(self):
        """From any thread: nobody wants it any more."""
        try:
            self.thread.call(self._cancelled)
        except Failure:
            pass        # it has ended with its Room

    def _cancelled(self):
        if not self.over:
            self.error = Failure("the job", "cancelled")
            self.thread.pool.cancel(self.submission)
            self._end()


class PipeStreams(JobStreams):
    """The pipes of a Process: our ends of them, {number in the job: descriptor}, which do not block."""

    def __init__(self, fds):
        super().__init__()
        self.fds = fds
        self.descriptors = {0: IN, 1: OUT, 2: OUT}
        for fd in fds.values():
            os.set_blocking(fd, False)

    def open(self, loop):
        """In the loop's thread, before the job starts."""
        self.sources[0] = ReplayableInput(Source(loop, self.fds[0], functools.partial(self.source_ready, 0)))
        for number in 1, 2:
            over = functools.partial(self._over, number)
            self.sinks[number] = Sink(loop, self.fds[number], functools.partial(self.consumed, number), over, over)

    def accepted(self):
        self.sources[0].remember(WINDOW_MAX)

    def visible(self):
        self.sources[0].remember(0)

    def input_stopped(self, number, consumed):
        self._close(0)

    def _over(self, number, error=None):
        self._close(number)
        self.sink_finished(number)

    def _close(self, number):
        fd = self.fds.pop(number, None)
        if fd is not None:
            if number in self.sinks:
                self.sinks[number].close()
            elif number in self.sources:
                self.sources[number].end()
            os.close(fd)

    def ended(self, report):
        for number in range(3):
            self._close(number)


class Process:
    """A job whose descriptors are pipes of this program, in the manner of subprocess.Popen.

    stdin, stdout, stderr: files for bytes.  worker: the address it ran at, after its end.
    status, and returncode, as subprocess calls it: None while it runs, then as in a Result.
    A worker that is lost before anything of the job was read is replaced; later that is a Failure, which wait() and
    poll() raise.  As a context manager it closes the files and waits.
    """

    def __init__(self, thread, names):
        import threading
        self._thread = thread
        self._over = threading.Event()
        self._failure = None
        self._movers = []               # threads of communicate()
        self._outputs = bytearray(), bytearray()
        self.status = None
        self.worker = None
        names, fds = job_names(names), []
        try:
            for _ in range(3):
                fds += os.pipe()
            self._streams = PipeStreams({0: fds[0], 1: fds[3], 2: fds[5]})
            self._submission = Submission(self._streams, names, thread.settings.retries, self._done)
            thread.call(self._start, self._submission)
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        self.stdin, self.stdout, self.stderr = open(fds[1], "wb"), open(fds[2], "rb"), open(fds[4], "rb")

    def _start(self):
        self._streams.open(self._thread.loop)
        self._thread.pool.submit(self._submission)

    def _done(self, status, failure, submission):
        self._streams.ended(None)
        self._end(None if failure else returncode(submission.report), failure)

    def _end(self, status, failure=None):
        self._thread.submissions.discard(self._submission)
        self.worker, self.status, self._failure = self._submission.worker, status, failure
        self._over.set()

    returncode = property(lambda self: self.status)

    def poll(self):
        """The status, or None while it runs."""
        if self._failure:
            raise self._failure
        return self.status

    def wait(self, timeout=None):
        """Waits for the end; returns the status.  subprocess.TimeoutExpired after so many seconds."""
        if not self._over.is_set():
            self._thread.check_wait()
        if not self._over.wait(timeout):
            import subprocess
            raise subprocess.TimeoutExpired(self._thread.key.name, timeout)
        return self.poll()

    def communicate(self, input=None, timeout=None):
        """Writes input and closes stdin, reads both outputs to their ends, waits; returns (stdout, stderr).  When
        subprocess.TimeoutExpired was raised it may be called again, and nothing is lost."""
        if not self._over.is_set():
            self._thread.check_wait()
        if not self._movers:
            import threading
            self._movers = [threading.Thread(target=target, args=args, daemon=True) for target, *args in (
                (self._write_all, input or b""), (self._read_all, self.stdout, self._outputs[0]),
                (self._read_all, self.stderr, self._outputs[1]))]
            for mover in self._movers:
                mover.start()
        until = None if timeout is None else time.monotonic() + timeout
        for mover in self._movers:
            mover.join(None if until is None else max(0, until - time.monotonic()))
            if mover.is_alive():
                import subprocess
                raise subprocess.TimeoutExpired(self._thread.key.name, timeout, *map(bytes, self._outputs))
        self.wait(None if until is None else max(0, until - time.monotonic()))
        return tuple(map(bytes, self._outputs))

    def _write_all(self, data):
        try:
            if not self.stdin.closed:
                with self.stdin:
                    self.stdin.write(data)
        except BrokenPipeError:
            pass        # the job reads no more

    def _read_all(self, file, output):
        if not file.closed:
            with file:
                for part in iter(lambda: file.read1(BUFFER), b""):
                    output += part

    def send_signal(self, number):
        """Sends INT, TERM, HUP, QUIT, USR1, USR2, TSTP, CONT or KILL to the job; nothing once it has ended."""
        name = signal.Signals(number).name[3:]
        if name not in (*SIGNALS, "KILL"):
            raise ValueError("signal %s cannot be sent to a job; these can: %s KILL" % (name, " ".join(SIGNALS)))
        if not self._over.is_set():
            self._thread.call(functools.partial(self._signal, name))

    def _signal(self, name):
        pool, submission = self._thread.pool, self._submission
        if submission.state is not JobState.DONE and (name == "KILL" or not pool.signal(submission, name)):
            pool.cancel(submission)
            self._end(-SIGNAL_NAMES[name])

    def terminate(self):
        """Sends TERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self):
        """Ends it at once."""
        self.send_signal(signal.SIGKILL)

    def __enter__(self):
        return self

    def __exit__(self, kind, *exception):
        if kind and self._thread.is_open():
            self.kill()
        for file in self.stdin, self.stdout, self.stderr:
            try:
                file.close()
            except BrokenPipeError:
                pass        # what was not written yet has no reader any more
        self._over.wait()


# ---------------------------------------------------------------- Executor
#
# The room as a pool of Python functions.

class CallError(RuntimeError):
    """What went wrong with a call of an Executor, in words: it raised what cannot be brought here, or could not be
    run."""


class InterpreterDied(CallError):
    """The interpreter that ran a call has ended under it; the words tell of what, and where."""


class RemoteTraceback(Exception):
    """The traceback of what a call raised, as text: the cause of its exception here."""

    def __str__(self):
        return '\n"""\n%s"""' % printable_lines(self.args[0])


INTERPRETER_IDLE = 60.0     # seconds without a call after which an interpreter gives its slot back
ABORT_PATIENCE = 2.0        # seconds until a Ctrl-C does not wait any longer
LEAVE_PATIENCE = 1.0        # seconds that an interpreter has to end by itself
CALL_LOOK = 0.05            # seconds between two looks whether a call turns out to be long
CALL_LONG_MOST = 2.0
BYTES_SLOW = 1e7            # bytes a second that travel at least
MIND = 0.25                 # seconds between two looks which interpreters are needed
START_FAILURES = 3          # in a row, and none that started: what waits is told why
LINE_LONGEST = 1 << 16      # bytes of a printed line that passes as one
SENT_EACH = 1 << 24        # bytes of one module or data file that is sent
SENT_MAX = 1 << 28       # bytes of all of them for one interpreter
SENT_ALONG = 1 << 22     # bytes of modules that go along with their package, unasked
QUESTIONS_MAX = 20000       # of one interpreter
QUESTIONS_AT_ONCE = 16      # of these, without a reply: it asks one after another, and signals may come in between
MAP_LEAST = 1000            # inputs that map takes at once
MAP_BYTES = 1 << 26         # bytes of calls that wait, after which it takes no more than there are slots


class Call:
    """One call at the submitter.  taker is told how it ends; it has three methods of concurrent.futures.Future."""
    __slots__ = ("pool", "data", "buffers", "size", "by_value", "taker", "state", "losses", "interpreter", "number",
                 "claimed")

    def __init__(self, pool, data, buffers, by_value, taker):
        self.pool = pool
        self.data = data
        self.buffers = buffers
        self.size = len(data) + (sum(map(len, buffers)) if buffers else 0)
        self.by_value = by_value        # the only version of Python that can read it, as code is in it; or None
        self.taker = taker
        self.state = CallState.QUEUED
        self.losses = 0                 # workers that were lost while they ran it
        self.interpreter = None         # which has it, unless it is queued
        self.number = None              # by which that one knows it
        self.claimed = False            # its taker cannot cancel it any more

    def claim(self):
        """Whether its taker still waits for it; from now on it does."""
        self.claimed = self.claimed or self.taker.set_running_or_notify_cancel()
        return self.claimed

    def on(self, event):
        self.state = next_state(CALL_STATES, self.state, event)
        if self.state is CallState.QUEUED:
            self.interpreter = None
        elif self.state is CallState.OVER:     # no reference is kept
            self.data = self.buffers = self.taker = self.interpreter = None


class CallSource:
    """The messages on their way to an interpreter."""

    def __init__(self):
        self.parts = collections.deque()
        self.over = False               # nothing comes behind them

    def put(self, parts):
        """Small messages travel in one piece."""
        for part in parts:
            last = self.parts[-1] if self.parts else None
            if len(part) < BUFFER_LEAST and isinstance(last, bytearray) and len(last) < BUFFER:
                last += part
            else:
                self.parts.append(bytearray(part) if len(part) < BUFFER_LEAST else part)

    def read_into(self, view):
        at = 0
        while self.parts and at < len(view):
            part = self.parts[0]
            size = min(len(part), len(view) - at)
            view[at:at + size] = part[:size] if size < len(part) else part
            at += size
            self.parts.popleft()
            if size < len(part):
                self.parts.appendleft(memoryview(part)[size:])
        return at if at or self.over else None

    def can_rewind(self):
        return True

    def rewind(self):
        """The Interpreter puts in what the next attempt needs."""

    def close(self):
        self.parts.clear()


class AnswerSink:
    """The messages from an interpreter."""

    def __init__(self, interpreter):
        self.interpreter = interpreter
        self.reader = CallReader()

    def feed(self, view):
        try:
            self.interpreter.on_messages(self.reader.read(view))
        except ProtocolError as error:
            self.interpreter.broken(error)
        self.interpreter.consumed(ANSWERS, len(view))
        self.interpreter.pool.after_messages()
        return False

    def finish(self):
        self.interpreter.sink_finished(ANSWERS)


class PrintSink:
    """What calls print: passes whole lines on."""

    def __init__(self, interpreter, number):
        self.interpreter = interpreter
        self.number = number
        self.line = bytearray()

    def feed(self, view):
        self.line += view
        end = self.line.rfind(b"\n") + 1
        self.pass_on(end if end or len(self.line) < LINE_LONGEST else len(self.line))
        self.interpreter.pool.after_messages()
        return False

    def pass_on(self, size=None):
        """So much of what is there."""
        data = bytes(self.line[:size])
        if data:
            del self.line[:size]
            self.interpreter.pool.tell(self.interpreter.pool.print, self.interpreter, self.number, data)

    def finish(self):
        self.pass_on()
        self.interpreter.sink_finished(self.number)


class Interpreter(JobStreams):
    """One interpreter of an Executor: the streams of its job, and the calls that it owes.  A CallPool makes it, and
    hears of its end from the Pool."""

    def __init__(self, pool):
        super().__init__()
        self.pool = pool
        self.state = InterpreterState.SEEKING
        self.descriptors = CALL_DESCRIPTORS
        self.submission = Submission(self, [], pool.settings.retries, pool.on_end)
        self.submission.accepts = pool.accepts
        self.instance = self.address = None     # of its worker
        self.leave_timer = NO_TIMER
        self._reset()

    def _reset(self):
        self.wanted_back = False            # its worker has others that wait for the slot
        self.worn_out = False               # it asks to be replaced
        self.owed = collections.OrderedDict()       # {number: Call} of those without an answer, as they were sent
        self.dropped = set()                # numbers of those that it is to leave out
        self.bytes_owed = 0
        self.sent = 0                       # calls in all
        self.seconds = None                 # that a call takes, on average
        self.patience = CALL_LONG           # seconds after which the call in hand is a long one
        self.suspected = None               # seconds after which the call in hand was taken for one
        self.began = None                   # when the call in hand did
        self.idle_since = time.monotonic()
        self.python = None                  # its version
        self.unanswered = 0                 # questions
        self.library = SourceLibrary(self.pool.main)
        self.source = CallSource()
        self.sources = {CALLS: self.source}
        self.sinks = {1: PrintSink(self, 1), 2: PrintSink(self, 2), ANSWERS: AnswerSink(self)}
        self.delivered.clear()

    # -- what the Pool says
    def begin(self, attempt):
        if self.state is InterpreterState.BOOTING:
            self.lost_calls()
            self.on("lost")
        self._reset()
        self.instance, self.address = attempt.kept.instance, attempt.kept.address
        self.source.put(self.pool.setup)
        super().begin(attempt)

    def accepted(self):
        self.on("started")
        self.pool.pump()

    def others_wait(self, waiting):
        self.wanted_back = waiting
        if waiting and self.state in (InterpreterState.BOOTING, InterpreterState.SERVING):
            self.take_back()
            self.pool.pump()

    def broken(self, error):
        """It does not speak as an interpreter does.  One that was ready is lost to the first call that it owes."""
        if self.attempt:
            if self.state is not InterpreterState.BOOTING:
                self._begin_next()
            self.pool.on_broken(self, Failure("interpreter on %s" % self.place, error))

    # -- calls
    def on(self, event):
        self.state = next_state(INTERPRETER_STATES, self.state, event)

    @property
    def place(self):
        return self.submission.worker

    def trip(self):
        return self.attempt.session.round_trip or 0.0 if self.attempt else 0.0

    def count(self):
        """How many calls it has to run."""
        return len(self.owed) - len(self.dropped)

    def calls(self):
        """Those, in their order."""
        return [call for number, call in self.owed.items() if number not in self.dropped]

    def room(self):
        """How many more calls it may be given now."""
        owed = self.count()
        if (self.state not in (InterpreterState.BOOTING, InterpreterState.SERVING) or self.wanted_back or self.worn_out
                or not self.attempt or owed and self.bytes_owed > CALLS_BYTES or self.is_held(time.monotonic())):
            return 0
        room = calls_most(self.seconds, self.trip()) - owed
        return room if self.pool.tasks is None else min(room, self.pool.tasks - self.sent)

    def is_done(self, now):
        """Whether it is to give its slot back, having no call."""
        return self.state is InterpreterState.SERVING and not self.count() and (
            self.wanted_back or self.worn_out or now - self.idle_since > INTERPRETER_IDLE)

    def give(self, call):
        """The caller then calls source_ready(CALLS)."""
        call.on("sent")
        self.sent += 1
        call.interpreter, call.number = self, self.sent
        self.owed[call.number] = call
        self.bytes_owed += call.size
        self.source.put(encode_call(CALL, call.number, call.data, call.buffers))
        self.worn_out = self.worn_out or self.sent == self.pool.tasks
        if self.state is InterpreterState.SERVING and self.began is None:
            self._begin_next()

    def _begin_next(self):
        """The first call that it owes is the one that it runs."""
        for number, call in self.owed.items():
            if number in self.dropped:
                continue
            if call.state is CallState.BEGUN:
                return
            if call.claim():
                call.on("its turn")
                self.began = time.monotonic()
                return
            self.pool.forget(call)
        self.began = None
        self.idle_since = time.monotonic()

    def drop(self, *calls):
        """It is not to run these calls, which it may have begun all the same."""
        for call in calls:
            self.dropped.add(call.number)
            self.source.put(encode_call(DROP, call.number))
        self.source_ready(CALLS)

    def take_back(self, keep=0):
        """Calls that were sent ahead, but for so many, wait again, in front of the others."""
        calls = [call for call in self.calls()[keep:] if call.state is CallState.SENT]
        self.drop(*calls)
        for call in reversed(calls):
            self.pool.again(call, "taken back")

    def lost_calls(self):
        """It has ended: those that it had not begun wait again; returns the others."""
        calls = self.calls()
        for call in reversed(calls):
            if call.state is CallState.SENT:
                self.pool.again(call, "taken back")
        self.owed.clear()
        return [call for call in calls if call.state is CallState.BEGUN]

    def is_held(self, now):
        """Whether the call in hand is a long one, behind which others would wait."""
        return self.began is not None and now - self.began > (
            self.patience + self.trip() + self.bytes_owed / BYTES_SLOW)

    def look(self, now):
        """A call in hand that is a long one keeps no others waiting."""
        if self.is_held(now) and self.count() > 1:
            self.suspected = now - self.began
            self.take_back(1)

    def _learn(self, took):
        """Calls took so many seconds there, the first one was in hand."""
        mean = sum(took) / len(took)
        self.seconds = mean if self.seconds is None else (self.seconds + mean) / 2
        if self.suspected and took[0] < self.suspected / 2:     # it was the way, or the machine is busy
            self.patience = min(2 * self.patience, CALL_LONG_MOST)
        self.suspected = None

    def leave(self):
        """No more calls: it ends by itself, or is ended."""
        self.on("leave")
        self.source.over = True
        self.source_ready(CALLS)
        self.leave_timer = self.pool.loop.call_later(LEAVE_PATIENCE, lambda: self.pool.end_interpreter(self))

    # -- messages
    def on_messages(self, messages):
        """Those that have come together, as CallReader.read() gives them."""
        took = []
        for kind, number, microseconds, data, buffers in messages:
            if not self.attempt:
                return
            if kind in (RETURNED, RAISED) and self.state is not InterpreterState.BOOTING:
                if not took:
                    self.end_lines()
                self.pool.on_answer(self, self._answered(number), number, kind, data, buffers)
                took.append(microseconds)
            elif kind == DROPPED and self.state is not InterpreterState.BOOTING:
                self._dropped(number)
            elif kind == READY and self.state is InterpreterState.BOOTING:
                self._ready(*parse_ready(bytes(data)))
            elif kind == WANTED and self.unanswered < QUESTIONS_AT_ONCE:
                self._asked(number, *parse_question(bytes(data)))
            elif kind == ENOUGH:
                if not self.worn_out:
                    self.worn_out = True
                    self.take_back(1)
            else:
                raise ProtocolError("a message of calls out of place")
        if took:
            self._learn([each / 1e6 for each in took])
        if self.state is not InterpreterState.BOOTING:
            self._begin_next()

    def _ready(self, python, failed):
        if failed:
            return self.pool.on_start_failed(self, *failed)
        self.python = python
        self.on("ready")
        self.pool.on_started(self)

    def _answered(self, number):
        """The call, which is owed no more."""
        call = self.owed.pop(number, None)
        if call is None:
            raise ProtocolError("an answer to no call")
        self.bytes_owed -= call.size
        self.dropped.discard(number)
        return call

    def _dropped(self, number):
        """It does not run this call: since it was told so, or since the one before took long."""
        in_hand = next((each for each in self.owed if each not in self.dropped), None)
        if number == in_hand:
            raise ProtocolError("an answer to no call that could be left out")
        told = number in self.dropped
        call = self._answered(number)
        if not told:
            self.pool.again(call, "taken back")

    def end_lines(self):
        """What came before an answer was printed before it: calls that have ended have no more of their lines."""
        for sink in self.sinks[1], self.sinks[2]:
            sink.pass_on()

    def _asked(self, number, *question):
        attempt = self.attempt
        self.unanswered += 1

        def answer(reply):
            if self.attempt is attempt and not self.source.over:
                self.unanswered -= 1
                self.source.put(encode_call(REPLY, number, reply))
                self.source_ready(CALLS)
        self.pool.librarian().call(functools.partial(self.library.answer, *question), answer)


class CallPool:
    """What an Executor does, without the Executor, which may be forgotten before its calls have ended: calls, the
    interpreters that run them, and two threads, one for the network (a PoolThread) and one that tells results.  A third
    one answers questions for modules, since reading files may take a while.

    What is not said to be for any thread is for the network's.
    """
    open = set()                        # those that have begun, until they are over

    def __init__(self, key, settings, most, setup, main, tasks):
        import threading
        from queue import SimpleQueue
        self.thread = PoolThread(key, settings, most, self.pump_soon)
        self.settings = settings
        self.most = most
        self.setup = setup              # parts of the first message to each interpreter
        self.main = main                # what is told of __main__, or None
        self.tasks = tasks              # calls that an interpreter runs before it is replaced, or None
        self.waiting = collections.deque()
        self.interpreters = set()
        self.taken = self.bytes_taken = 0       # calls that were submitted
        self.settled = self.bytes_settled = 0   # calls of which no more is heard
        self.avoidance = Avoidance()    # of workers whose interpreters did not start
        self.start_failures = 0         # in a row
        self.started = set()            # instances whose interpreters have started
        self.woken = False              # pump() will be called
        self.closing = False            # no more calls are taken
        self.lock = threading.RLock()   # of `taken` and `closing`; the collector of garbage may shut down
        self.told = []                  # what the teller is to be given
        self.news = SimpleQueue()       # what it has been
        self.teller = None
        self.finished = threading.Event()
        self.maps = []                  # CallMaps from which nobody has taken yet
        self.looking = None             # the timer of _look()
        self.minding = None             # of _mind()
        self.helper = None
        self.aborted = False
        self.load = CallLoader().load
        self.pid = os.getpid()

    # -- for any thread
    def submit(self, data, buffers, by_value, taker, of_map=False):
        """Makes a Call.  RuntimeError after shutdown and in a forked child, Failure where no thread can be started."""
        call = Call(self, data, buffers, by_value, taker)
        with self.lock:
            if not of_map or self.finished.is_set():
                self.check_open()
            if self.teller is None:
                self._begin()
            self.taken += 1
            self.bytes_taken += call.size
        self.waiting.append(call)
        try:
            self.pump_soon()
        except Failure:
            self.waiting.remove(call)
            self._count_settled(call)
            raise
        return call

    def _begin(self):
        import threading
        self.teller = threading.Thread(target=self._tell_all, name="cexec.Executor", daemon=True)
        self.teller.start()
        self.open.add(self)

    def check_open(self):
        if self.pid != os.getpid():
            raise RuntimeError("this Executor belongs to another process; a forked child makes one of its own")
        if self.closing:
            raise RuntimeError("cannot schedule new futures after shutdown")

    def _call(self, function):
        """function() in the network's thread, unless that is over."""
        try:
            self.thread.call(function)
        except Failure:
            if not self.thread.closed:
                raise

    def pump_soon(self):
        if not self.woken:
            self.woken = True           # first: the other thread may be quicker
            try:
                self._call(self.pump)
            except Failure:
                self.woken = False
                raise

    def close(self):
        """Takes no more calls but those of maps."""
        with self.lock:
            self.closing = True

    def cancelled(self, call):
        """Nobody wants its result any more."""
        self._call(lambda: self._cancelled(call))

    def shutdown(self, cancel=False):
        """No more calls; those there are run to their end, or are cancelled where they have not begun."""
        if self.pid == os.getpid():
            self.close()
            if self.teller is None:
                self.finished.set()
            else:
                self._call(self._cancel_waiting if cancel else self.pump)

    def finish(self, wait, cancel=False):
        """shutdown(), and waits until all is over."""
        self.close()
        if cancel:
            for run in self.maps:
                run.close()
            self.maps.clear()
        while wait and self.maps:
            self.maps[0].complete()
            del self.maps[0]
        self.shutdown(cancel)
        if wait:
            self.finished.wait()
            self.thread.close()         # and waits for the thread's own end

    def abort(self):
        """Ends all, the calls in hand too."""
        self.close()
        self.aborted = True
        self.maps.clear()
        if self.teller is not None:
            self._call(self._abort)
            self.finished.wait(ABORT_PATIENCE)

    def forget_map(self, run):
        """It needs no finish() to be complete."""
        if run in self.maps:
            self.maps.remove(run)

    def is_own_thread(self):
        import threading
        return threading.current_thread() in (self.teller, self.thread.thread)

    def check_wait(self):
        """Failure where the caller would wait for ever for what only its own thread can bring."""
        if self.is_own_thread():
            raise Failure("this Executor", "what a future calls at its end cannot wait for a call: all of them would "
                          "stop", "use add_done_callback() there, or another thread")

    # -- the teller's thread
    def tell(self, what, *arguments):
        """From the network's thread: what(*arguments) is called by the teller, in the order of the calls of this."""
        self.told.append((what, arguments))

    def flush(self):
        if self.told:
            told, self.told = self.told, []
            self.news.put(told)

    def after_messages(self):
        self.flush()
        if self.waiting or self.closing:
            self.pump()

    def _tell_all(self):
        while True:
            told = self.news.get()
            if told is None:
                self.finished.set()
                return
            for what, arguments in told:
                try:
                    what(*arguments)
                except BaseException as error:
                    report_in_thread(error)
            told = what = arguments = None      # no reference is kept

    def print(self, interpreter, number, data):
        """Writes what a call has printed to this program's own standard output or error."""
        file = sys.stdout if number == 1 else sys.stderr
        try:
            file.write(data.decode("utf-8", "replace"))
            file.flush()
        except Exception:
            pass        # it is closed, or None: as with a print here, the program goes on without
        try:
            self.thread.call(lambda: interpreter.consumed(number, len(data)))
        except Failure:
            pass

    def _result(self, taker, kind, data, buffers, place):
        try:
            if kind == RETURNED:
                return taker.set_result(self.load(data, buffers))
            error = self._raised(data, place)
        except BaseException as problem:
            error = problem
        taker.set_exception(error)

    def _raised(self, data, place):
        """The exception of a call, its remote traceback as its cause."""
        text, words, pickled = self.load(data, [])
        try:
            error = self.load(pickled, []) if pickled is not None else None
        except BaseException as problem:
            words += " (it cannot be unpickled here: %s)" % words_of(problem)
            error = None
        if not isinstance(error, BaseException):
            error = CallError("on %s: %s" % (place, printable_lines(words)))
        error.__cause__ = RemoteTraceback(text)
        return error

    # -- calls
    def pump(self):
        """Gives calls to interpreters, looks for more of them, and ends when all is done."""
        self.woken = False
        self._give()
        now = time.monotonic()
        for interpreter in self.interpreters:
            if interpreter.is_done(now):
                interpreter.leave()
        self._look_for_slots()
        self.flush()
        self._maybe_over()

    def _give(self):
        slots = [each for each in self.interpreters if each.room() > 0]
        while self.waiting and slots:
            share = -(-len(self.waiting) // len(slots))
            slots.sort(key=Interpreter.count)
            given = 0
            for slot in slots:
                room, before = min(slot.room(), share), given
                while room > 0 and self.waiting:
                    call = self.waiting.popleft()
                    if call.state is CallState.OVER:
                        continue
                    if call.by_value and slot.python != call.by_value:
                        if slot.python is None:
                            self.waiting.appendleft(call)
                            break
                        self._refuse(call, slot)
                        continue
                    slot.give(call)
                    room, given = room - 1, given + 1
                if given > before:
                    slot.source_ready(CALLS)
            slots = [each for each in slots if each.room() > 0] if given else []
        if not self.looking and any(len(each.owed) > 1 for each in self.interpreters):
            self.looking = self.loop.call_later(CALL_LOOK, self._look)

    def _refuse(self, call, interpreter):
        self.fail(call, CallError("the function has no source, so its code would be sent, which Python %d.%d here has "
                                  "made and Python %d.%d on worker %s cannot run" % (
                                      *call.by_value, *interpreter.python, interpreter.place)))

    def _look(self):
        self.looking = None
        now = time.monotonic()
        for interpreter in self.interpreters:
            interpreter.look(now)
        self.pump()

    def again(self, call, event):
        """It waits again, in front."""
        call.on(event)
        self.waiting.appendleft(call)

    def settle(self, call, event):
        """It has ended; returns who is to be told."""
        taker = call.taker
        call.on(event)
        self._count_settled(call)
        return taker

    def _count_settled(self, call):
        self.settled += 1
        self.bytes_settled += call.size

    def forget(self, call):
        """It was cancelled."""
        if call.interpreter:
            call.interpreter.drop(call)
        self.settle(call, "cancelled")

    def fail(self, call, error):
        if call.claim():
            self.tell(self.settle(call, "failed").set_exception, error)
        else:
            self.forget(call)

    def on_answer(self, interpreter, call, number, kind, data, buffers):
        """Where a call was sent twice, the first answer counts."""
        if call.state is CallState.OVER:
            return
        if call.interpreter and (call.interpreter is not interpreter or call.number != number):
            call.interpreter.drop(call)
        if call.claim():
            self.tell(self._result, self.settle(call, "answered"), kind, data, buffers, interpreter.place)
        else:
            self.settle(call, "cancelled")

    def _cancelled(self, call):
        if call.state in (CallState.QUEUED, CallState.SENT):
            call.taker.set_running_or_notify_cancel()
            self.forget(call)
            self.flush()
            self.pump()

    def _cancel_waiting(self):
        calls = [call for each in self.interpreters for call in each.owed.values()]
        for call in [*self._take_waiting(), *calls]:
            if call.state in (CallState.QUEUED, CallState.SENT) and call.taker.cancel():
                call.taker.set_running_or_notify_cancel()
                self.forget(call)
        self.pump()

    def _take_waiting(self):
        """The calls that wait; other threads may add to them meanwhile."""
        return [self.waiting.popleft() for _ in range(len(self.waiting))]

    def fail_waiting(self, make_error):
        for call in self._take_waiting():
            if call.state is CallState.QUEUED:
                self.fail(call, make_error())

    def _abort(self):
        self._cancel_waiting()
        for interpreter in list(self.interpreters):
            self.end_interpreter(interpreter)

    # -- interpreters
    @property
    def loop(self):
        return self.thread.loop

    def librarian(self):
        """The thread that answers questions for modules."""
        if self.helper is None or self.helper.loop is not self.loop:
            self.helper = Helper(self.loop)
        return self.helper

    def _look_for_slots(self):
        pool, waiting = self.thread.pool, len(self.waiting)
        seeking = sum(each.state is InterpreterState.SEEKING for each in self.interpreters)
        while seeking < waiting and len(self.interpreters) < self.most and pool.has_capacity():
            interpreter = Interpreter(self)
            self.interpreters.add(interpreter)
            self.thread.submissions.add(interpreter.submission)
            pool.submit(interpreter.submission)
            seeking = sum(each.state is InterpreterState.SEEKING for each in self.interpreters)
        pool.more = max(0, min(waiting - seeking, self.most - len(self.interpreters)))
        if self.interpreters and not self.minding:
            self.minding = self.loop.call_later(MIND, self._mind)

    def _mind(self):
        """No more slots are looked for than there are calls for; interpreters that nobody needs end."""
        self.minding = None
        if not self.waiting:
            for interpreter in [each for each in self.interpreters if each.state is InterpreterState.SEEKING]:
                self.end_interpreter(interpreter)
        self.pump()

    def end_interpreter(self, interpreter):
        """At once, whatever it does."""
        if interpreter.submission.state is not JobState.DONE:
            self.thread.pool.cancel(interpreter.submission)
            self.on_end(None, Failure("the call", "cancelled"), interpreter.submission)

    def on_started(self, interpreter):
        self.started.add(interpreter.instance)
        self.start_failures = 0

    def on_start_failed(self, interpreter, trace, words):
        """Its initializer has raised something."""
        place = interpreter.place

        def error():
            failure = CallError("the initializer failed on worker %s: %s" % (place, printable_lines(words)))
            failure.__cause__ = RemoteTraceback(trace)
            return failure
        interpreter.lost_calls()
        self._count_failure(interpreter, error)
        self.end_interpreter(interpreter)

    def on_broken(self, interpreter, failure):
        """What it says makes no sense: its calls run elsewhere."""
        self.thread.pool.fail(interpreter.submission, failure)
        self._count_failure(interpreter, lambda: Failure(*failure.args))

    def accepts(self, instance, address):
        """Whether an interpreter may be started on this worker now."""
        serving = {each.address for each in self.interpreters if each.state is InterpreterState.SERVING}
        return not self.avoidance.passes_over(time.monotonic(), instance, address, serving)

    def _count_failure(self, interpreter, make_error):
        """An interpreter did not start, or broke.  Its worker is passed over for a while; if nobody else has done
        better, calls that wait are told."""
        self.start_failures += 1
        self.avoidance.failed(time.monotonic(), interpreter.instance, interpreter.address)
        if self.start_failures >= START_FAILURES and not self.started - {interpreter.instance}:
            self.fail_waiting(make_error)

    def on_end(self, status, failure, submission):
        """An interpreter has ended, or its worker is lost, or none was found."""
        interpreter = submission.streams
        self.thread.submissions.discard(submission)
        self.interpreters.discard(interpreter)
        interpreter.leave_timer.cancel()
        begun = interpreter.lost_calls()
        if failure is None:
            self._ended(interpreter, submission, begun)
        else:
            for call in begun:
                self._lost(call, failure)
        if failure and self.thread.thread is None:      # it has ended with an error, and pump() with it
            self.woken = False
        if isinstance(failure, NoWorker) or failure and self.thread.thread is None:
            self.fail_waiting(lambda: type(failure)(*failure.args))
        self.flush()
        self.pump_soon()

    def _ended(self, interpreter, submission, begun):
        report = submission.report
        words = "%s%s on worker %s" % (
            "was ended by signal %d (%s)" % (report.number, report.name or "unknown") if report.signalled else
            "ended with status %d" % report.number, ", " + report.reason if report.reason else "", submission.worker)
        for call in begun:
            self.fail(call, InterpreterDied("the interpreter that ran the call %s" % words))
        if interpreter.state is InterpreterState.BOOTING:
            self._count_failure(interpreter, lambda: InterpreterDied(
                "the interpreter %s before it was ready: is it cservice --python that serves there?" % words))

    def _lost(self, call, failure):
        call.losses += 1
        if call.losses > self.settings.retries or self.thread.thread is None or self.aborted:
            self.fail(call, Failure(*failure.args))
        else:
            self.again(call, "lost")

    def _maybe_over(self):
        """After shutdown, when nothing is left to be done, all ends: interpreters, the network, the teller."""
        if not self.closing or self.taken > self.settled or self.maps or self.thread.closed:
            return
        for interpreter in list(self.interpreters):
            if interpreter.state is InterpreterState.SEEKING:
                self.end_interpreter(interpreter)
            elif interpreter.state is not InterpreterState.LEAVING:
                interpreter.leave()
        if not self.interpreters:
            self.thread.close(wait=False)
            if self.helper:
                self.helper.end()
            self.flush()
            self.news.put(None)
            self.open.discard(self)


def end_pools():
    """At the program's end: calls complete, unless it ends by a Ctrl-C."""
    interrupted = getattr(sys, "last_type", None)
    for pool in list(CallPool.open):
        if pool.pid != os.getpid():
            continue
        try:
            if interrupted is not None and issubclass(interrupted, KeyboardInterrupt):
                pool.abort()
            else:
                pool.finish(wait=True)
        except KeyboardInterrupt:
            pool.abort()
            raise


@functools.lru_cache(maxsize=None)
def end_pools_at_exit():
    import atexit
    atexit.register(end_pools)


def report_in_thread(error):
    """What a callback of a future has raised that futures do not catch."""
    import traceback
    traceback.print_exception(type(error), error, error.__traceback__)


class SourceLibrary:
    """Answers the questions of one interpreter for modules of this program.  Nothing is imported for that, a module is
    asked for by its dotted name and never by a path, and what is sent is bounded.  Used in one thread."""

    def __init__(self, main):
        self.main = main
        self.packages = {}              # {name: folder} of regular packages that were sent
        self.questions = 0
        self.bytes_sent = 0

    def answer(self, kind, name, more):
        """The pickle of the reply: for a module (where it comes from, file name, whether it is a package, source, words
        for what is missing), for a package also {name: the same} of what is below it; for data its bytes, for a folder
        {name: whether it is a folder}; None where there is nothing."""
        import pickle
        self.questions += 1
        reply = None
        try:
            if self.questions <= QUESTIONS_MAX and all(part.isidentifier() for part in name.split(".")):
                reply = {"module": self._module, "data": self._data, "folder": self._folder}[kind](name, more)
        except Exception:
            pass        # what cannot be looked up or read is not there
        if reply is None and kind == "module":
            reply = MISSING, "", False, b"", ""
        if kind == "module" and reply[0] == THERE_SIDE and reply[2] and "." not in name:
            reply += self._imported_below(name),
        return pickle.dumps(reply, 4)

    def _imported_below(self, package):
        """What this program itself has imported below the package: at a distance each question takes a while."""
        replies, most = {}, self.bytes_sent + SENT_ALONG
        for name in sorted(each for each in list(sys.modules) if each.startswith(package + ".")):
            try:
                reply = self._module(name, "") if self.bytes_sent < most else None
            except Exception:
                continue        # as in answer()
            if reply and reply[0] == THERE_SIDE:
                replies[name] = reply
        return replies

    # -- modules
    def _module(self, name, local):
        spec = find_spec_here(name)
        if spec is None:
            return (HERE_SIDE if local else MISSING), "", False, b"", ""
        if spec.loader is None or spec.origin in (None, "namespace"):
            return (NAMESPACE, "", True, b"", "") if spec.submodule_search_locations is not None else None
        side = side_of(spec.origin)
        if side == "standard" or side == "installed" and local and name.partition(".")[0] != "cloudpickle":
            return (HERE_SIDE if local else MISSING), "", False, b"", ": it is of the submitter's standard library"
        source = self._read(spec.loader, spec.origin) if spec.origin.endswith(".py") else None
        if source is None:
            return MISSING, "", False, b"", ": it is compiled, or has no source, so it has to be installed there"
        is_package = spec.submodule_search_locations is not None
        if is_package:
            self.packages[name] = os.path.realpath(os.path.dirname(spec.origin))
        return THERE_SIDE, spec.origin, is_package, source, ""

    def _read(self, loader, path):
        """The bytes of a file, or of a member of a zip file; None for what is no regular file, or too much."""
        if os.path.getsize(path) > SENT_EACH if os.path.isfile(path) else type(loader).__name__ != "zipimporter":
            return None
        data = read_source(path, loader)
        if self.bytes_sent + len(data) > SENT_MAX:
            return None
        self.bytes_sent += len(data)
        return data

    # -- data files, of packages that were sent
    def _inside(self, package, name):
        """(loader, path) of what is in the package's folder, or None."""
        folder = self.packages.get(package)
        parts = name.split("/") if name else []
        if folder is None or not set(parts).isdisjoint({"", ".", ".."}) or "\0" in name or os.sep != "/":
            return None
        path = os.path.join(folder, *parts)
        if os.path.realpath(path) != path:
            return None         # a link, of which nobody knows where it leads to the next moment
        return find_spec_here(package).loader, path

    def _data(self, package, name):
        inside = self._inside(package, name)
        return inside and self._read(*inside)

    def _folder(self, package, name):
        inside = self._inside(package, name)
        if not inside or not os.path.isdir(inside[1]):
            return None
        with os.scandir(inside[1]) as entries:
            return {entry.name: entry.is_dir(follow_symlinks=False) for entry in entries}


def find_spec_here(name):
    """The spec of a module of this program, without importing anything: of what has been imported, or what the path
    finders find; None where there is none."""
    from importlib.machinery import PathFinder
    spec = getattr(sys.modules.get(name), "__spec__", None)
    if getattr(spec, "name", None) == name and getattr(spec, "loader", None) is not None:
        return spec
    parent = name.rpartition(".")[0]
    if not parent:
        return PathFinder.find_spec(name)
    above = find_spec_here(parent)
    places = getattr(sys.modules.get(parent), "__path__", None)
    if places is None:
        places = above and above.submodule_search_locations
    return PathFinder.find_spec(name, list(places)) if places is not None else None


def side_of(path):
    """"standard", "installed" or "own": whose a file that is imported from is."""
    path = os.path.realpath(path)
    parts = path.split(os.sep)
    if "site-packages" in parts or "dist-packages" in parts or is_below(path, installed_folders()):
        return "installed"
    return "standard" if is_below(path, standard_folders()) else "own"


def is_below(path, folders):
    return any(path.startswith(folder.rstrip(os.sep) + os.sep) for folder in folders)


@functools.lru_cache(maxsize=None)
def standard_folders():
    import sysconfig
    return {os.path.realpath(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")}


@functools.lru_cache(maxsize=None)
def installed_folders():
    import site, sysconfig
    folders = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    if hasattr(site, "getsitepackages"):
        folders.update(site.getsitepackages())
        folders.add(site.getusersitepackages())
    return {os.path.realpath(folder) for folder in folders if folder}


def shadowed_modules():
    """Names of the standard library by which this program has imported modules from elsewhere."""
    names = standard_names().intersection(sys.modules)
    specs = [(name, getattr(sys.modules[name], "__spec__", None)) for name in names]
    return [name for name, spec in specs
            if getattr(spec, "has_location", False) and spec.origin and side_of(spec.origin) == "own"]


def main_here():
    """What interpreters are told of this program's __main__ so that they can run it; None where it has no source."""
    module = sys.modules["__main__"]
    path, spec = getattr(module, "__file__", None), getattr(module, "__spec__", None)
    if not path or path.endswith(".pyc"):
        return None
    try:
        source = read_source(path, getattr(module, "__loader__", None))
    except (OSError, ImportError, AttributeError):
        return None
    return {"file": os.path.abspath(path), "source": source, "name": spec.name if spec else "__main__",
            "package": getattr(module, "__package__", None)}


class CallPickler:
    """Pickles what is called, in the caller's thread."""

    def __init__(self, main):
        import pickle
        self.dumps = pickle.dumps
        self.main = main
        self.finds_main = None if main else main_finder_class()

    def pickle(self, value):
        """(pickle, [buffer], the version of Python that alone can read it or None)."""
        try:
            if self.finds_main:
                self.finds_main(io.BytesIO(), 5).dump(value)
            data, buffers = dump(self.dumps, value)
            version = None
        except Exception as error:
            try:
                import cloudpickle
            except ImportError:
                raise error from None
            data, buffers = dump(script_dumps(cloudpickle, self.main["source"]) if self.main else cloudpickle.dumps,
                                 value)
            version = sys.version_info[:2]
        # What is changed from now on is not what runs.
        return data, [bytes(buffer) for buffer in buffers], version


def main_finder_class():
    import pickle, types

    class MainFinder(pickle.Pickler):
        """Fails for what is of a __main__ that has no source."""

        def reducer_override(self, value):
            if isinstance(value, (type, types.FunctionType)) and value.__module__ == "__main__":
                raise pickle.PicklingError(
                    "%r is of a __main__ that has no source which a worker could run; put it into a module or a "
                    "script, or install cloudpickle here" % value.__qualname__)
            return NotImplemented
    return MainFinder


class CallLoader:
    """Unpickles what workers send.  A module that has been imported, or is just being so, is not waited for."""

    def __init__(self):
        import pickle

        class Unpickler(pickle.Unpickler):
            def find_class(self, module, name):
                found = sys.modules.get("__main__" if module == "__mp_main__" else module)
                try:
                    return operator.attrgetter(name)(found)
                except AttributeError:
                    return super().find_class(module, name)
        self.unpickler = Unpickler

    def load(self, data, buffers):
        return self.unpickler(LongPickle(data) if len(data) > BUFFER_LEAST else io.BytesIO(data),
                              buffers=buffers).load()


class CallMapItem:
    """One call of a map; the taker of its Call."""
    __slots__ = ("run", "over", "value", "error")

    def __init__(self, run):
        self.run = run
        self.over = False
        self.value = None
        self.error = None

    def set_running_or_notify_cancel(self):
        return not self.run.closed

    def cancel(self):
        from concurrent.futures import CancelledError
        self.set_exception(CancelledError())
        return True

    def set_result(self, value):
        self.value = value
        self._end()

    def set_exception(self, error):
        self.error = error
        self._end()

    def _end(self):
        self.over = True
        if self.run.awaited is self:
            with self.run.changed:
                self.run.changed.notify_all()


class CallMap:
    """The calls of one map, whose inputs are taken in callers' threads, a bounded number ahead of the results."""

    def __init__(self, pool, pickler, function, inputs, timeout, most):
        import threading
        self.pool = pool
        self.pickler = pickler
        self.function = function
        self.inputs = inputs            # None once they are at their end
        self.until = None if timeout is None else time.monotonic() + timeout
        self.most = most
        self.items = collections.deque()    # (CallMapItem, Call or None) whose results nobody has taken yet
        self.awaited = None             # the CallMapItem that somebody waits for
        self.changed = threading.Condition()
        self.wanted = True              # somebody may still take results
        self.closed = False

    def is_full(self):
        """Whether large inputs keep it from taking more of them."""
        return (self.pool.bytes_taken - self.pool.bytes_settled > MAP_BYTES
                and len(self.items) > min(self.pool.most, self.pool.thread.slots))

    def take_inputs(self, count):
        """Starts calls for so many more inputs."""
        while self.inputs is not None and count > 0 and not self.is_full():
            arguments = next(self.inputs, self)
            if arguments is self:
                self.inputs = None
                return
            item = CallMapItem(self)
            try:
                data, buffers, version = self.pickler.pickle((self.function, arguments, {}))
            except Exception as error:
                item.set_exception(error)
                self.items.append((item, None))
            else:
                self.items.append((item, self.pool.submit(data, buffers, version, item, of_map=True)))
            count -= 1

    def next_result(self):
        self.take_inputs(min(2, self.most - len(self.items) + 1))
        if not self.items:
            raise StopIteration
        item = self.items[0][0]
        if not item.over:
            self.pool.check_wait()
            self._wait_for(item, self.until)
        if self.closed:         # meanwhile
            raise StopIteration
        self.items.popleft()
        if isinstance(item.error, StopIteration):       # which would end the iteration, as if all was done
            raise RuntimeError("a call of map raised StopIteration") from item.error
        if item.error is not None:
            raise item.error
        return item.value

    def _wait_for(self, item, until=None):
        self.awaited = item
        with self.changed:
            while not item.over and not self.closed:
                patience = None if until is None else until - time.monotonic()
                if patience is not None and patience <= 0:
                    from concurrent.futures import TimeoutError
                    raise TimeoutError()
                self.changed.wait(patience)
        self.awaited = None

    def complete(self):
        """Runs what is left, for nobody, or for whoever takes the results later."""
        pending = collections.deque(item for item, _ in self.items)
        while self.inputs is not None and not self.closed:
            if pending and (len(pending) >= self.most or self.is_full()):
                self._wait_for(pending.popleft())
            while not self.wanted and self.items and self.items[0][0].over:
                self.items.popleft()
            before = len(self.items)
            self.take_inputs(1)
            if len(self.items) > before:
                pending.append(self.items[-1][0])

    def close(self):
        """Nobody wants it any more: calls that have not begun never do."""
        self.closed, self.inputs = True, None
        for _, call in self.items:
            if call is not None:
                self.pool.cancelled(call)
        self.items.clear()
        with self.changed:
            self.changed.notify_all()


class CallResults:
    """The iterator that Executor.map returns."""

    def __init__(self, executor, run):
        self._executor = executor       # which is not to be forgotten before
        self._run = run
        self._taken = False
        self._turn = _thread.allocate_lock()        # of threads that share it

    def __iter__(self):
        return self

    def __next__(self):
        if not self._taken:
            self._taken = True
            self._run.pool.forget_map(self._run)
        try:
            with self._turn:
                return self._run.next_result()
        except BaseException:
            self.close()
            raise

    def close(self):
        """Ends the map: calls that have not begun never do."""
        self._taken = True
        self._run.pool.forget_map(self._run)
        self._run.close()

    def __del__(self):
        if self._taken:
            self._run.close()
        else:
            self._run.wanted = False


class CallExecutor:
    """The room as a concurrent.futures.Executor, for Python functions.

        with cexec.Executor("py.pub") as pool:
            for result in pool.map(math.sqrt, range(5)):
                print(result)

    key: the path of py.pub; its workers run `cservice --python py [PYTHON [ARG...]]`.
    max_workers: interpreters at once, 256 at most, which is what None means.
    initializer(*initargs): called once in each interpreter.  One that fails tells the calls that wait why and where,
    unless it does not fail on other workers, which then run them.
    max_tasks_per_child: calls after which an interpreter is replaced.
    settings: those of cexec by their names in lower case, as for a Room: group, timeout_accept, retries ...

    It is used as ProcessPoolExecutor is, which it differs from in this:
    - A call whose interpreter dies fails alone, with an InterpreterDied; nothing breaks the pool.
    - A call whose worker is lost runs again elsewhere, `retries` times: so calls should do no harm twice.  Failure is
      for what the cluster could not do.
    - Arguments are pickled in submit(), by cloudpickle where pickle refuses and cloudpickle is installed.  What cannot
      be pickled is the future's error.
    - Code goes along.  The script is run once in each interpreter that needs something of it, as __mp_main__, and all
      calls there share its variables, those of lambdas too; what is defined behind its guard goes along by cloudpickle
      only.  Modules outside the standard library and site-packages come from here; those in site-packages come from the
      worker if it has them, else from here if they are plain Python.  What is compiled has to be installed on the
      worker.
    - What calls print comes out at sys.stdout and sys.stderr here, before their results.  Standard input is empty.
    - cancel() works on a call that was sent ahead as well; it may have begun within the last round trip.
    - map() takes its inputs as its results are taken, a bounded number ahead.  Threads may share its results.
    - A callback of a future may submit calls; Failure where it would wait for one.
    - Processes that a call starts anew (multiprocessing's spawn) find only what is installed on the worker.
    - Ctrl-C in the main thread ends the calls, and so does the cancellation of a coroutine that is inside `with`.

    Whoever holds py.pub can run any Python on the workers, and a worker's answers can run any Python here.
    """

    def __init__(self, key, max_workers=None, initializer=None, initargs=(), max_tasks_per_child=None, **settings):
        script = CallLoop.current and CallLoop.current.script
        if script and script.state is ScriptState.RUNS:
            raise RuntimeError(NO_GUARD)
        if "mp_context" in settings:
            raise TypeError("an Executor of cexec has no mp_context: its interpreters run on other machines, each "
                            "started anew")
        for name, number in ("max_workers", max_workers), ("max_tasks_per_child", max_tasks_per_child):
            if number is not None and (not isinstance(number, int) or number <= 0):
                raise ValueError("%s must be greater than 0" % name)
        if initializer is not None and not callable(initializer):
            raise TypeError("initializer must be a callable")
        key, warning = load_key(os.fsdecode(key), "public")
        if warning:
            import warnings
            warnings.warn(warning, stacklevel=2)
        self._max_workers = min(256, max_workers or 256)        # dask reads it
        self._pickler = CallPickler(main_here())
        self._pool = CallPool(key, room_settings(settings), self._max_workers,
                              self._setup(initializer, initargs), self._pickler.main, max_tasks_per_child)
        import weakref
        weakref.finalize(self, self._pool.shutdown).atexit = False
        end_pools_at_exit()

    def _setup(self, initializer, arguments):
        import pickle
        main, data, buffers = self._pickler.main, None, []
        if initializer is not None:
            data, buffers, _ = self._pickler.pickle((initializer, tuple(arguments)))
        return encode_call(SETUP, 0, pickle.dumps({
            "main": main, "argv": sys.argv if main else None, "shadowed": shadowed_modules(),
            "python": sys.version_info[:2],
            "initializer": data, "buffers": buffers}, 4))

    def submit(*call, **named):
        """submit(function, *arguments, **named): calls function(*arguments, **named) in the room; returns the Future of
        its result.  The call is pickled here and now."""
        if len(call) < 2:
            raise TypeError("submit() missing the function to call")
        self, function, *arguments = call
        future = future_class()()
        try:
            pickled = self._pickler.pickle((function, arguments, named))
        except Exception as error:
            self._pool.check_open()
            future.set_exception(error)
            return future
        future.room_call = self._pool.submit(*pickled, future)
        return future

    def map(self, function, *iterables, timeout=None, chunksize=1, buffersize=None):
        """An iterator of function(*inputs) for the inputs that iterables give, as the built-in map; results come in the
        inputs' order.

        Inputs are taken at once, up to twice the room's slots and at least 1,000 (buffersize: so many), and the rest as
        results are; once 64 MiB of them wait, no more than there are slots.
        timeout: seconds from this call after which a result that is not there is a TimeoutError.
        chunksize counts for nothing: calls travel together by themselves.
        """
        if chunksize < 1:
            raise ValueError("chunksize must be >= 1.")
        if buffersize is not None and not isinstance(buffersize, int):
            raise TypeError("buffersize must be an integer or None")
        if buffersize is not None and buffersize < 1:
            raise ValueError("buffersize must be None or > 0")
        self._pool.check_open()
        most = buffersize or max(MAP_LEAST, 2 * self._pool.thread.slots)
        run = CallMap(self._pool, self._pickler, function, zip(*iterables), timeout, most)
        self._pool.maps.append(run)
        try:
            run.take_inputs(most)
        except BaseException:
            self._pool.forget_map(run)
            run.close()
            raise
        if run.inputs is None:
            self._pool.forget_map(run)
        return CallResults(self, run)

    def shutdown(self, wait=True, *, cancel_futures=False):
        """Takes no more calls.  wait: until all are done, also those of a map from which nobody has taken yet.
        cancel_futures: those that have not begun never do."""
        pool = self._pool
        if pool.pid == os.getpid():
            try:
                pool.finish(wait and not pool.is_own_thread(), cancel_futures)
            except KeyboardInterrupt:
                pool.abort()
                raise

    def __enter__(self):
        return self

    def __exit__(self, kind, *exception):
        """Waits for all calls; after a Ctrl-C it ends them.  In a coroutine that comes as a cancellation."""
        cancelled = getattr(sys.modules.get("asyncio"), "CancelledError", KeyboardInterrupt)
        if kind is not None and issubclass(kind, (KeyboardInterrupt, cancelled)):
            self._pool.abort()
        else:
            self.shutdown()
        return False


@functools.lru_cache(maxsize=None)
def future_class():
    """A Future whose cancel() keeps its call from being run.  Its module takes as long to import as all others."""
    from concurrent.futures import Future

    class CallFuture(Future):
        room_call = None            # its Call

        def cancel(self):
            cancelled = super().cancel()
            if cancelled and self.room_call:
                self.room_call.pool.cancelled(self.room_call)
            return cancelled

        def result(self, timeout=None):
            self._check_wait()
            return super().result(timeout)

        def exception(self, timeout=None):
            self._check_wait()
            return super().exception(timeout)

        def _check_wait(self):
            if self.room_call and not self.done():
                self.room_call.pool.check_wait()
    return CallFuture


@functools.lru_cache(maxsize=None)
def executor_class():
    from concurrent.futures import Executor as Base

    class Executor(CallExecutor, Base):
        __doc__ = CallExecutor.__doc__
    Executor.__qualname__ = "Executor"
    return Executor


def __getattr__(name):
    """Executor is made when it is first wanted."""
    if name == "Executor":
        return executor_class()
    raise AttributeError("module %r has no attribute %r" % (__name__, name))


NO_GUARD = """this script makes an Executor while a worker runs it to find its functions
  what only the program itself shall do belongs behind: if __name__ == "__main__":"""


# ---------------------------------------------------------------- demo

DEMO_TEXT = b"one job, the best machine in the room, and every byte of it comes back\n"


class Demo:
    """Two workers, a crat and one job on the loopback network, and a key in a temporary folder that goes with the demo;
    with its own command also a cmap over a few inputs, and some calls of Python functions.

    The tools are forks of this process and no new programs, so that it does not matter whether there is a file to start
    again: `ssh host python3 - demo < cexec.py` works.  What they say is shown where something fails.
    """
    PATIENCE = 30.0         # seconds until a tool must be ready
    SLOW = "sleep 0.5; tr a-z A-Z"      # what each job of the cmap does
    INPUTS = b"one two three four five six seven eight".split()

    def __init__(self, command, many):
        import tempfile
        self.command = command
        self.many = many                    # whether to show a cmap too
        self.running, self.ended = {}, {}   # {name: pid}, {name: status as of a shell}
        self.place = tempfile.TemporaryDirectory(prefix="cexec-")
        self.folder = self.place.name
        os.chmod(self.folder, 0o700)        # the umask may take even this user's rights
        self.key = os.path.join(self.folder, "app")
        write_halves(self.key, self.key + ".pub", make_keypair(os.urandom(32))[0], True)
        self.environment = {name: value for name, value in os.environ.items()
                            if not any(name in setting.names for setting in SETTINGS)}
        # A loopback address that several processes hear, on a port that nobody else has.
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind(("127.0.0.1", 0))
            self.environment["GROUP"] = ("127.255.255.255:%d" if LINUX else "lo0:224.0.1.87:%d") % (
                probe.getsockname()[1])

    def tell(self, text):
        say("demo", text)

    def type(self, line, words=""):
        """What a user would type, and what comes of it."""
        self.tell("$ " + ("%-31s  # %s" % (line, words) if words else line))

    def act(self, title):
        self.tell("")
        self.tell(title)

    def run(self):
        """The acts in turn; returns the status of the first one's job."""
        self.tell("a room on this machine alone; what you would type stands behind $")
        self.type("ckeygen app", "a key: app for workers, app.pub for submitters")
        for number in (1, 2):
            self.serve("worker %d" % number, self.command)
        self.start("crat", self.tool(CRAT, "app.pub"), self.folder)
        self.type("crat app.pub", "the log")
        status = self.run_one()
        if self.many and not status:
            self.run_many()
            if os.path.isfile(own_path()):
                self.run_calls()
        return status

    def serve(self, name, command, *options):
        """A worker of that command."""
        self.start(name, self.tool(CSERVICE, *options, self.key, *command))
        words = [*options, "app", *("'%s'" % word if " " in word else word for word in command)]
        self.type("cservice " + " ".join(words), name + " is ready")

    def run_one(self):
        """One job."""
        self.act("1. One job, on the best worker:")
        self.type("cexec app.pub < input")
        began = time.monotonic()
        self.fork("cexec", self.tool(CEXEC, "app.pub"), self.folder, self.input(), 1, 2)
        status = self.status_of("cexec")
        took = time.monotonic() - began
        self.hear("crat", "for app.pub", 2)
        if status == EXIT_TEMPORARY:
            self.show("worker 1")
            self.show("worker 2")
        self.tell("==> status %d after %.2f s" % (status, took))
        self.tell("    the log: " + "".join(self.lines("crat")[1:]).partition(" job ")[0])
        return status

    def stop_workers(self):
        workers = [name for name in self.running if name.startswith("worker")]
        for name in workers:
            os.kill(self.running[name], signal.SIGTERM)
        for name in workers:
            self.status_of(name)

    def run_many(self):
        """Many inputs at once, on workers whose jobs take a while."""
        self.stop_workers()
        self.act("2. Many jobs, on all workers:")
        for number in (3, 4):
            self.serve("worker %d" % number, ["sh", "-c", self.SLOW], "--concurrency", "2")
        self.type("printf '%%s\\n' %s | cmap --lines app.pub" % b" ".join(self.INPUTS).decode())
        began = time.monotonic()
        self.start("cmap", self.tool(CMAP, "--lines", "app.pub"), self.folder, b"\n".join(self.INPUTS) + b"\n",
                   "failed, on")
        took, one_by_one = time.monotonic() - began, 0.5 * len(self.INPUTS)
        self.tell(" ".join(line for line in self.lines("cmap") if line.isupper()))
        self.tell("==> %d jobs of half a second each took %.1f s: %.1f times as fast as one after another" % (
            len(self.INPUTS), took, one_by_one / took))

    def run_calls(self):
        """Functions of Python, in an interpreter of a worker."""
        self.stop_workers()
        self.act("3. Python functions, in the interpreters of a worker:")
        self.serve("worker 5", [], "--python")
        self.tell(">>> with cexec.Executor(\"app.pub\") as pool: print(*pool.map(math.sqrt, [1, 4, 9, 16]))")
        began = time.monotonic()
        self.start("python", self.call_functions, self.folder, word="4.0")
        self.tell(" ".join(self.lines("python")))
        self.tell("==> after %.2f s, the start of the interpreter with it" % (time.monotonic() - began))

    def call_functions(self):
        """In the fork: the program that makes the calls."""
        with executor_class()("app.pub") as pool:
            say("", " ".join(map(str, pool.map(math.sqrt, [1, 4, 9, 16]))), 1)

    # -- the tools
    def tool(self, *arguments):
        """What a fork has to call to be this tool."""
        return functools.partial(main, ["cexec.py", *arguments])

    def start(self, name, call, folder=None, input=b"", word="ready"):
        """Starts a tool and waits until it has said the word."""
        source, output = pipe_of(input), os.open(os.path.join(self.folder, name), os.O_WRONLY | os.O_CREAT, 0o600)
        self.fork(name, call, folder, source, output, output)
        os.close(output)
        os.close(source)
        if not self.hear(name, word, self.PATIENCE):
            status = self.status_of(name, os.WNOHANG)
            self.show(name)
            raise Failure("%s did not get ready" % name, "" if status is None else "it ended with status %d" % status,
                          "what it said is above")

    def hear(self, name, word, seconds):
        """Whether a tool says this word within so many seconds, and before it ends."""
        end = time.monotonic() + seconds
        while True:
            over = time.monotonic() > end or self.status_of(name, os.WNOHANG) is not None
            if any(word in line for line in self.lines(name)):
                return True
            if over:
                return False
            time.sleep(0.01)

    def lines(self, name):
        """Those that the tool has said so far."""
        return read_lines(os.path.join(self.folder, name))

    def show(self, name):
        for line in self.lines(name):
            self.tell("%s: %s" % (name, line))

    def fork(self, name, call, folder, *standard):
        """A process that calls, in this folder or where the user stands, with these descriptors as 0, 1 and 2."""
        child = os.fork()
        if child:
            self.running[name] = child
            return
        status = EXIT_TEMPORARY
        try:
            for number in DEMO_SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            for number, fd in enumerate([fcntl.fcntl(fd, fcntl.F_DUPFD, 3) for fd in standard]):
                os.dup2(fd, number)
            close_strays()
            if folder:
                os.chdir(folder)
            os.environ.clear()
            os.environ.update(self.environment)
            status = call() or 0
        except SystemExit as end:
            status = end.code
        except Exception as error:
            self.tell("%s: %s: %s" % (name, type(error).__name__, error))
        finally:
            os._exit(status)

    def status_of(self, name, options=0):
        """Waits for the end of this tool; its status.  With WNOHANG None where it has not ended."""
        if name in self.running:
            pid, status = os.waitpid(self.running[name], options)
            if not pid:
                return None
            del self.running[name]
            self.ended[name] = status >> 8 if not status & 127 else 128 + (status & 127)
        return self.ended[name]

    def input(self):
        """A descriptor for the job: standard input if that brings anything, else one of the text."""
        try:
            os.read(0, 0)       # or it is only open for writing
            if stat.S_ISREG(os.fstat(0).st_mode):
                brings = os.lseek(0, 0, os.SEEK_CUR) < os.fstat(0).st_size
            else:
                brings = not os.isatty(0) and select.select([0], [], []) and unread_bytes(0)
        except OSError:
            brings = False
        return 0 if brings else pipe_of(DEMO_TEXT)

    def close(self):
        """Ends what runs, waits for it, and takes the folder away."""
        for pid in reversed(list(self.running.values())):
            os.kill(pid, signal.SIGTERM)
            end = time.monotonic() + 10
            while not os.waitpid(pid, os.WNOHANG)[0]:
                if time.monotonic() > end:
                    os.kill(pid, signal.SIGKILL)
                time.sleep(0.01)
        self.place.cleanup()


def pipe_of(data):
    """A descriptor from which these few bytes can be read."""
    reading, writing = os.pipe()
    os.write(writing, data)
    os.close(writing)
    return reading


DEMO_SIGNALS = signal.SIGTERM, signal.SIGHUP, signal.SIGINT


def demo(arguments, settings):
    """demo [COMMAND [ARG...]]"""
    command = arguments or ["tr", "a-z", "A-Z"]
    find_command(command[0])
    park_standard()
    for number in DEMO_SIGNALS:
        signal.signal(number, end_demo)
    show = Demo(command, many=not arguments)
    try:
        return show.run()
    finally:
        show.close()


def end_demo(number, frame):
    signal.signal(number, signal.SIG_IGN)
    raise SystemExit(128 + number)


# ---------------------------------------------------------------- the tools

# -- completion: an option of each tool, files for values that name one, the words of a choice

FILE_ARGUMENTS = "FILE", "LIST", "APP.pub"

BASH_COMPLETION = """\
# Completion for cexec: eval "$(cexec.py completion bash)"
_cexec() {
    local tool=${COMP_WORDS[0]##*/} word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]} words=
    [ "$word" != = ] || word=
    [ "$before" != = ] || before=${COMP_WORDS[COMP_CWORD-2]}
    if [ "$tool" = cexec.py ]; then
        tool=${COMP_WORDS[1]}
        [ "$COMP_CWORD" != 1 ] || { COMPREPLY=($(compgen -W "%(tools)s" -- "$word")); return; }
    fi
    tool=${tool%%.py}
    COMPREPLY=()
    case "$tool $before" in
%(values)s    esac
    case "$tool" in
%(options)s    esac
    if [[ $word = -* ]]; then
        COMPREPLY=($(compgen -W "$words" -- "$word"))
    fi
}
complete -o default -F _cexec %(names)s
"""

ZSH_COMPLETION = """\
#compdef %(names)s
# Completion for cexec: eval "$(cexec.py completion zsh)", behind compinit
_cexec_tool() {
    case $1 in
%(tools)s    esac
}
_cexec() {
    local state
    if [[ $service = cexec.py ]]; then
        _arguments '1:tool:(%(words)s)' '*::argument:->rest'
        [[ $state != rest ]] || _cexec_tool $words[1]
    else
        _cexec_tool ${service%%.py}
    fi
}
compdef _cexec %(names)s
"""


def completion(arguments, settings):
    """completion bash|zsh|fish"""
    shells = {"bash": bash_completion, "zsh": zsh_completion, "fish": fish_completion}
    if len(arguments) != 1 or arguments[0] not in shells:
        raise Failure("the name of a shell is wanted", "", "usage: cexec.py completion bash|zsh|fish", EXIT_USAGE)
    return print_out(shells[arguments[0]]())


def choices(argument):
    """The words of an argument that is a choice, as lines|bytes."""
    return argument.split("|") if "|" in argument else []


def called_names():
    """Under which the shell may call this: the tools that a link makes, and the file itself."""
    return " ".join([name for name in TOOLS if name not in NOT_LINKED] + ["cexec.py"])


def bash_completion():
    def case(tool, before, words):
        return '        "%s %s") COMPREPLY=($(compgen -W "%s" -- "$word")); return;;\n' % (tool, before, words)
    values, options = [case("completion", "completion", "bash zsh fish")], []
    for tool in TOOLS:
        found = options_of(tool)
        options.append('        %s) words="%s";;\n' % (tool, " ".join(option for option, *_ in found)))
        for option, argument, *_ in found:
            if choices(argument):
                values.append(case(tool, option, " ".join(choices(argument))))
            elif argument in FILE_ARGUMENTS:
                values.append('        "%s %s") return;;\n' % (tool, option))
            elif argument:
                values.append('        "%s %s") compopt +o default 2>/dev/null; return;;\n' % (tool, option))
    return BASH_COMPLETION % {"tools": " ".join(TOOLS), "values": "".join(values), "options": "".join(options),
                              "names": called_names()}


def zsh_completion():
    def quoted(text):
        for mark in "\\[]:":
            text = text.replace(mark, "\\" + mark)
        return text.replace("'", "'\\''")
    tools = []
    for tool in TOOLS:
        specs = []
        for option, argument, words, _ in options_of(tool):
            values = "(%s)" % " ".join(choices(argument)) if choices(argument) else (
                "_files" if argument in FILE_ARGUMENTS else " ")
            specs.append("'%s%s[%s]%s'" % ("*" if argument else "", option + ("=" if argument else ""),
                                           quoted(words), ":%s:%s" % (quoted(argument), values) if argument else ""))
        operands = {CSERVICE: "'1:key:_files' '*:::command: _normal'", "demo": "'*:::command: _normal'",
                    "completion": "'1:shell:(bash zsh fish)'"}.get(tool, "'*:file:_files'")
        tools.append("        %s) _arguments -A '-*' \\\n            %s;;\n" % (
            tool, " \\\n            ".join(specs + [operands])))
    return ZSH_COMPLETION % {"tools": "".join(tools), "words": " ".join(TOOLS), "names": called_names()}


def fish_completion():
    def quoted(text):
        return "'%s'" % text.replace("\\", "\\\\").replace("'", "\\'")
    lines = ["# Completion for cexec: cexec.py completion fish > ~/.config/fish/completions/cexec.fish",
             "complete -c cexec.py -n __fish_use_subcommand -x -a %s" % quoted(" ".join(TOOLS))]
    for tool in TOOLS:
        for option, argument, words, _ in options_of(tool):
            spelling = ("-l " + option[2:] if option[:2] == "--" else
                        "-s " + option[1:] if len(option) == 2 else "-o " + option[1:])
            value = ("-x -a " + quoted(" ".join(choices(argument))) if choices(argument) else
                     "" if not argument else "-r" if argument in FILE_ARGUMENTS else "-x")
            for called in "-c " + tool, "-c cexec.py -n '__fish_seen_subcommand_from %s'" % tool:
                lines.append(" ".join(filter(None, ["complete", called, spelling, value, "-d", quoted(words)])))
    return "\n".join(lines) + "\n"


class Tool(collections.namedtuple("Tool", "call synopsis text first statuses example")):
    """call(arguments, settings) returns the status; first: the options that help shows before all others."""
    __slots__ = ()


TOOLS = collections.OrderedDict([
    ("ckeygen", Tool(ckeygen, CKEYGEN_USAGE[7:], """\
Makes the private key APP for the workers and its submitting half APP.pub for
the submitters.  Both are secret.  If APP exists, only APP.pub is made from it.
""", (), """\
0    done
2    wrong usage; -l: a FILE is missing or no key
101  APP exists and is no private key
102  APP.pub cannot be written
103  APP cannot be written
104  APP exists and is another key than the one from standard input
""", """\
$ ckeygen app             # then copy app to the workers,
                          # and app.pub to those that only submit
$ ckeygen -l app app.pub  # the fingerprint, to compare
""")),
    (CEXEC, Tool(cexec, "cexec [OPTION...] APP[.pub] [NAME=VALUE...]", """\
Runs the job that the workers of the key serve on the best of them, as if it
were local.  The job finds each VALUE in its environment as PEER_NAME.
""", ("-t", "-n", "-v", "-q", "--timeout-accept", "--group"), """\
0-255  the job's own; 128+n: it died of signal n
111    the cluster failed: to try again may help
2      wrong usage, or every worker refuses the job for good
""", """\
$ cexec app.pub < song.wav > song.ogg
$ cexec app.pub SIZE=100x100 < photo.jpg > small.jpg
$ cexec -v app.pub < /dev/null         # tells each step
""")),
    (CMAP, Tool(cmap, "cmap [OPTION...] APP[.pub] [FILE...]", """\
Runs one job for each of many inputs, on all the slots of the room, and makes
one exact result of it.  Inputs are the FILEs, those named in --from LIST, or,
by --lines, --block or --value, parts of standard input.  In --set and --out
{} stands for the input's name or line, {.} for it without its ending, {/}
without folders, {/.} without both, {#} for its number.
""", ("--out", "--lines", "--value", "--block", "--from", "--set", "--jobs", "--log", "--resume", "--again",
      "--timeout"), """\
0      all jobs ended with 0
1      some failed
111    the cluster failed: to try again may help
2      wrong usage
128+n  ended by signal n
""", """\
$ cmap --out 'ogg/{/.}.ogg' app.pub wav/*.wav
$ cmap --lines app.pub < urls > pages
$ seq 100 | cmap --value FRAME --out 'frames/{}.png' app.pub
""")),
    (CSERVICE, Tool(cservice, "cservice [OPTION...] APP COMMAND [ARG...], or cservice --stop APP", """\
Serves jobs for the key: each runs COMMAND with the submitter's descriptors.
--python APP [PYTHON [ARG...]]: calls of Python functions, in place of COMMAND.
SIGTERM: no new jobs, the running ones finish; a second one ends them.
""", ("-d", "--stop", "--now", "--python", "--concurrency", "--user", "--if", "--limit", "--scratch", "--allow",
       "--log"), """\
0    told to stop; -d: it is ready; --stop: all have ended
111  a temporary failure
2    wrong usage; --stop: a service manager runs one, which is not stopped
""", """\
$ cservice app oggenc -o- -            # serves until Ctrl-C
$ cservice -d app oggenc -o- -         # in the background
$ cservice --stop app
$ cservice --python py venv/bin/python # for cexec.Executor("py.pub")
""")),
    (CWHO, Tool(cwho, "cwho [OPTION...] APP[.pub]...", """\
Lists the workers of the keys: who is there, what they do, what they are worth.
""", ("--check", "--watch", "--jobs", "--slots", "--json"), """\
0    somebody has answered; --check: a job could run
111  nobody has answered; --check: no job could run
2    wrong usage
""", """\
$ cwho app.pub
$ cwho --check app.pub                 # nobody answers? it says why
$ seq 9 | xargs -P"$(cwho --slots app.pub)" -I{} cexec app.pub FRAME={}
""")),
    (CRAT, Tool(crat, "crat [OPTION...] [APP.pub...]", """\
Prints one line for every job that was completed, and for every worker that was
reported as lost or broken.  Of keys that are not named it tells the number.
""", ("--time", "--json"), """\
0    told to stop
141  the reader of standard output is gone
2    wrong usage
""", """\
$ crat --time app.pub >> log
""")),
    (CPROXY, Tool(cproxy, "cproxy [OPTION...] SELF [TARGET]", """\
Joins two networks: what is heard on GROUP goes on to TARGET (255.255.255.255)
from the address SELF, and the connections that come back are relayed.
""", ("--key", "--group"), """\
0    told to stop
111  a temporary failure
2    wrong usage
""", """\
$ cproxy --key app.pub 10.0.1.1 eth1:255.255.255.255
""")),
    ("demo", Tool(demo, "demo [COMMAND [ARG...]]", """\
Shows it all on this machine alone: a key, two workers, a log, and jobs.
""", (), """\
that of the job, as cexec gives it
""", """\
$ python3 cexec.py demo
$ python3 cexec.py demo gzip -9 < file > file.gz
""")),
    ("completion", Tool(completion, "completion bash|zsh|fish", """\
Prints what makes the shell complete the tools' names and options with Tab.
""", (), """\
0    done
2    wrong usage
""", """\
$ eval "$(cexec.py completion bash)"   # in ~/.bashrc
$ eval "$(cexec.py completion zsh)"    # in ~/.zshrc, behind compinit
$ cexec.py completion fish > ~/.config/fish/completions/cexec.fish
""")),
])


NOT_LINKED = "demo", "completion"       # called as cexec.py NAME only


def options_of(tool):
    """[(option, argument or "", help, names in the environment)] in the order in which help shows them."""
    found = [(flag, "", words, ()) for flag, (_, _, tools, words) in FLAGS.items() if tool in tools]
    for setting in SETTINGS:
        if tool in setting.tools:
            default = " (%s)" % setting.default if setting.default else ""
            found.append((setting.option, setting.argument, setting.help + default, setting.names))
    first = TOOLS[tool].first
    return sorted(found, key=lambda option: first.index(option[0]) if option[0] in first else len(first))


def usage(tool):
    _, synopsis, text, _, statuses, example = TOOLS[tool]
    start = "cexec.py " if tool in NOT_LINKED else ""
    lines = ["usage: " + start + synopsis.replace(", or ", "\n       "), "", text.rstrip("\n")]
    options = options_of(tool)
    if options:
        import textwrap
        named = "; in brackets: the variable that says the same" if any(names for *_, names in options) else ""
        lines += ["", "Options%s:" % named]
        for option, argument, words, names in options:
            head, words = (option + " " + argument).strip(), words + (" [%s]" % ", ".join(names) if names else "")
            rows = textwrap.wrap(words, 55, break_on_hyphens=False)
            if len(head) > 21:
                rows.insert(0, "")
            lines += ["  %-22s%s" % (head if row == 0 else "", words) for row, words in enumerate(rows)]
    for head, rows in ("Exit status:", statuses), ("Example:", example):
        lines += ["", head] + ["  " + row for row in rows.splitlines()]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def overview():
    return "usage: cexec.py TOOL [ARGUMENT...], or TOOL by a symbolic link of that name\n\n" + "".join(
        "  %s\n" % words for tool in TOOLS.values() for words in tool.synopsis.split(", or ")
    ) + "\ncexec.py TOOL --help tells more; cexec.py demo shows it\n"


def no_tool(word):
    """Says that there is no such tool, and which was perhaps meant."""
    hint = did_you_mean(word, list(TOOLS))
    say("cexec.py", "%s: %s%s" % (
        word or "an empty word", "unknown option" if word.startswith("-") else "no such tool",
        "; " + hint.strip() if hint else ""))


def print_out(text, descriptor=1):
    """Help that cannot be printed is a failure with a status of its own."""
    try:
        os.write(descriptor, text.encode())
        return 0
    except OSError:
        return 255


def tool_of(argv):
    """(tool or None, its arguments) by the name the program was called under, else by the first argument."""
    name = os.path.basename(argv[0])
    name = name[:-3] if name.endswith(".py") else name
    if name in TOOLS and not (name == CEXEC and argv[0].endswith(".py")):
        return name, argv[1:]
    if len(argv) > 1 and argv[1] in TOOLS:
        return argv[1], argv[2:]
    return None, argv[1:]


def main(argv, environment=os.environ):
    """Runs the tool that argv names; returns its exit status."""
    tool, arguments = tool_of(argv)
    if arguments[:1] and arguments[0] in SHOWN:
        return show(tool, arguments[0])
    if arguments[:1] == ["help"] and not any(map(os.path.exists, ("help", "help.pub"))):
        return show(next((word for word in arguments[1:] if word in TOOLS), tool), "--help")
    if tool is None:
        if arguments:
            no_tool(arguments[0])
        print_out(overview(), 2)
        return EXIT_USAGE
    return run_tool(tool, arguments, environment)


def show(tool, word):
    """Prints what a word of SHOWN asks for; returns the exit status."""
    if word == "--version":
        return print_out("%s %s\n" % (tool + " (cexec)" if tool else "cexec", VERSION))
    return print_out(usage(tool) if tool else overview())


def run_tool(tool, arguments, environment):
    """Every error that a user must hear ends up here."""
    settings = None
    try:
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:       # as the head left it
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if tool != CEXEC:
            gc.enable()
        if __name__ == "__main__":
            name_process(tool)
        if tool in NOT_LINKED:
            return TOOLS[tool].call(arguments, None)
        settings, arguments = read_settings(tool, arguments, environment)
        settings = settings_here(settings)
        if hasattr(settings, "shown"):
            return show(tool, settings.shown)
        check_device(settings)
        for warning in unknown_variables(environment):
            say(tool, warning, errors_place(settings))
        return TOOLS[tool].call(arguments, settings)
    except Exception as error:
        if environment.get("CEXEC_DEBUG") == "1":
            import traceback
            for line in traceback.format_exc().splitlines():
                say("", line, errors_place(settings))
        return report_failure(tool, failure_of(error), settings)


def check_device(settings):
    """Failure where the GROUP that was given, perhaps a word that is no device at all, has none here."""
    if "group" in settings.given and settings.group.only:
        try:
            device_index(settings.group.only)
        except Failure as failure:
            raise Failure(settings.given["group"], failure.why if failure.what in settings.given["group"].split("=")
                          else str(failure), failure.hint, EXIT_USAGE) from None


def name_process(name):
    """What ps, pgrep and killall call this process (Linux): else they would call it python3."""
    try:
        with open("/proc/self/comm", "w") as file:
            file.write(name)
    except OSError:
        pass


def failure_of(error):
    """The Failure that tells of any exception; its status is never one that could be the job's own."""
    if isinstance(error, Failure):
        return error
    if isinstance(error, MemoryError):
        return Failure("out of memory")
    if isinstance(error, OSError):
        return Failure(os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else
                       "the system refused", fork_reason(error))
    if isinstance(error, ImportError):
        return Failure("this Python is not complete", error, "install the whole of it, as with: apt install python3",
                       EXIT_USAGE)
    return Failure("internal error", "%s: %s" % (type(error).__name__, error), "CEXEC_DEBUG=1 shows where")


def errors_place(settings):
    """The descriptor for lines of our own: the one of --fd-for-errors, where it is open and the job's are others."""
    fd = getattr(settings, "errors_fd", None)
    return 2 if fd is None or fd <= settings.max_fd or not is_open(fd) else fd


def report_failure(tool, failure, settings):
    fd = errors_place(settings)
    say(tool, str(failure), fd)
    if failure.hint:
        say("", "  " + failure.hint, fd)
    return failure.status


if __name__ == "__main__":
    try:
        code = main(sys.argv)
    except SystemExit as end:
        code = end.code
    except KeyboardInterrupt:
        code = die_of(signal.SIGINT)    # or a shell's loop would go on
    os._exit(code)      # helper threads may sit in a read or write that never ends
