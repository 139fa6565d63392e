#!/bin/sh
"exec" "python3" "-IS" "-c" '''
import _frozen_importlib_external as importing, _signal, gc, os, sys
gc.disable()
if _signal.getsignal(_signal.SIGINT) is not _signal.SIG_IGN:
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
del sys.argv[0]
path = os.path.realpath(sys.argv[0])
try:
    places = [os.stat(place) for place in (os.path.dirname(path), os.path.dirname(importing.cache_from_source(path)))
              if os.path.exists(place)]
    mask = os.umask(0o22)
    safe = all(not place.st_mode & 0o22 and place.st_uid in (0, os.geteuid()) for place in places)
    code = (importing.SourceFileLoader("__main__", path).get_code("__main__") if safe else
            compile(open(path, "rb").read(), path, "exec", dont_inherit=True))
    os.umask(mask)
except OSError as error:
    sys.exit("%s: %s" % (sys.argv[0], error))
sys.modules["__main__"].__file__ = path
exec(code, sys.modules["__main__"].__dict__)
''' "$0" "$@"

# The lines above are for both languages.  A script is compiled anew at every start, which takes longer than a small
# job; so sh hands it to Python as a module, whose bytecode Python keeps beside it.  Where others could write the
# folder, and so plant bytecode, there is no keeping.  The collector of cycles would look through all that is imported
# several times over; whoever runs for longer turns it on again.  Started as `python3 cexec.py` all this is one string
# without effect.

# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the cexec authors

__doc__ = """cexec: ad-hoc clusters in one file.

Copy this file to every machine of a room.  `ckeygen app` makes a key once; `cservice app COMMAND` on the workers serves
jobs; `cexec app.pub < in > out` runs COMMAND on the best of them as if it were local: every descriptor, the exit
status, Ctrl-C.  `crat` logs what happened, `cproxy` joins networks, `demo` shows it all on one machine.  The tool is
the name the file is called by (a symbolic link) or its first argument.

How a job flows:

    cexec                                          cservice
    announces on UDP              - GROUP ->       every worker sets a timer: the idler, the shorter
    ranks who connects            <-  TCP -        the first ones connect and say what they are worth
    takes the first proven one    <-  TLS ->       forks a handler, which shows the other half of the key
    sends job and data            - session ->     runs COMMAND in a group of its own
    writes data, ends as it did   <- session -     sends data and the exit status
    tells how it went             - GROUP ->       crat prints a line

The order of the sections: numbers, errors, groups, settings, datagrams, keys, frames, the job's description, the
session, the choice of a worker (all of them pure: bytes, times and chance come in as arguments); then, touching the
world: TLS, event loop, group sockets, descriptors, carrier, children, and the tools: cexec, cservice, crat, cproxy,
ckeygen, demo; at the end the table of tools and main.
"""

import binascii
import collections
import errno
import fcntl
import gc
import hashlib
import heapq
import hmac
import math
import os
import select
import signal
import socket
import stat
import struct
import sys
import time

VERSION = "1.0"
ssl = None      # tls_context() imports it: it takes as long as all the others, and cexec has announced its job by then

# ---------------------------------------------------------------- numbers

EXIT_USAGE = 2
EXIT_TEMPORARY = 111        # the cluster failed, try again later: the old convention of qmail and its kin

PORT = 3010                 # UDP, announcements and alerts
LINUX, MACOS = sys.platform.startswith("linux"), sys.platform == "darwin"

# Sizes, bytes.
FRAME_MAX = 1 << 22         # longest data message: the largest window at once
CONTROL_MAX = 1 << 16       # longest other message: a job with a thousand NAME=VALUE fits, a flood does not
WINDOW_START = 1 << 19      # credit at the start, two buffers: more is no faster on a short path and costs memory
WINDOW_MAX = 1 << 22        # credit on a long path (40 ms at 100 MB/s), bounded in sum by WINDOWS_MAX
WINDOWS_MAX = 1 << 24       # sum of one receiver's windows; what a blocked reader can cost in memory
RECORD = 1 << 14            # the most that one record of TLS carries
BUFFER = 1 << 18            # one read or one write of the channel: sixteen TLS records
FD_SETSIZE = 1024           # select(2) takes no descriptor from here on
DESCRIPTOR_MAX = 1 << 15    # highest descriptor number a job may have: the wire's field is 16 bits wide


# ---------------------------------------------------------------- errors

class Failure(Exception):
    """What the user must hear: what failed, why, and what to do.  Caught in main only."""

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
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode("ascii") for c in text)


def reason_of(error):
    """The system's words for an OSError, or the error's own."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def say(prefix, text, descriptor=2):
    """Writes one line; an error descriptor that is closed or full costs the line, never the program."""
    line = "%s: %s\n" % (prefix, printable(text)) if prefix else printable(text) + "\n"
    try:
        os.write(descriptor, line.encode("utf-8", "replace"))
    except OSError:
        pass


# ---------------------------------------------------------------- groups

GROUP_FORMS = "an address, not a name: 255.255.255.255, 224.0.1.9, ff02::1%eth0, 10.0.0.7, " \
    "with a port as 10.0.0.7:3010 or [ff02::1%eth0]:3010, with a device as eth0:255.255.255.255"
PORTS_FORMS = "ports from 1024 to 65535, as 4000 or 4000,4002 or 4000-4010"
DEVICE_MAX = 15             # bytes of an interface's name, a limit of every kernel
ALL_HOSTS = "255.255.255.255"


class Group(collections.namedtuple("Group", "device address family port kind scope")):
    """Where datagrams go.

    device   the only interface to use, for sending and for receiving; "" for all
    address  numeric, without scope       family  AF_INET or AF_INET6       port  UDP
    kind     "broadcast" (the global one), "multicast" or "unicast"; a subnet's broadcast looks like unicast
    scope    the interface named after the % of an IPv6 address; "" if none
    """
    __slots__ = ()

    @property
    def only(self):
        """The one interface that may be used, or ""."""
        return self.device or self.scope

    @property
    def loopback(self):
        """Whether nothing sent there leaves this host."""
        return (self.address.startswith("127.") or self.address == "::1" or self.only in LOOPBACK_NAMES
                or self.kind == "multicast" and self.address.startswith(("ff01:", "ff11:")))

    def __str__(self):
        address = self.address + ("%" + self.scope if self.scope else "")
        return ((self.device + ":" if self.device else "")
                + ("[%s]:%d" if self.family == socket.AF_INET6 else "%s:%d") % (address, self.port))


LOOPBACK_NAMES = ("lo", "lo0")


def parse_group(text):
    """The Group that a GROUP or TARGET names: [DEVICE:]ADDRESS[:PORT].  ValueError says what is accepted.

    What reads as an address without a device is one, so a device called like hexadecimal digits needs
    brackets around the IPv6 address that follows it.
    """
    words = text.strip()
    place = split_place(words)
    device, colon, rest = words.partition(":")
    if not place and colon and device_name(device):
        place = split_place(rest or ALL_HOSTS)
    else:
        device = ""
    if not place:
        raise ValueError(GROUP_FORMS)
    (address, family, scope), port = place
    kind = kind_of(address, family)
    if device and scope and device != scope:
        raise ValueError("one device, not both %s and %s" % (device, scope))
    if kind == "unicast" and address.startswith(("fe8", "fe9", "fea", "feb")) and not (scope or device):
        raise ValueError("a link-local address needs its device, as in %s%%eth0" % address)
    return Group(device, address, family, port, kind, scope)


def split_place(text):
    """((address, family, scope), port) of ADDRESS[:PORT]; None for anything else."""
    if text.startswith("["):
        inside, closed, after = text[1:].partition("]")
        address = parse_address(inside)
        if not closed or not address or address[1] != socket.AF_INET6:
            return None
    else:
        address, after = parse_address(text), ""
        if not address:
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


def parse_port(text, least):
    """The number of a port; None unless it is one from `least` on."""
    number = int(text) if text.isascii() and text.isdigit() and len(text) <= 5 else 0
    return number if least <= number <= 65535 else None


def parse_ports(text):
    """[(low, high), ...] of `a,b,c`, `a:b` and `a-b`.  A worker connects to no port below 1024, so none is accepted."""
    ranges = []
    for word in filter(None, text.replace(" ", ",").split(",")):
        low, dash, high = word.replace(":", "-").partition("-")
        low, high = parse_port(low, 1024), parse_port(high if dash else low, 1024)
        if not low or not high or low > high:
            raise ValueError(PORTS_FORMS)
        ranges.append((low, high))
    if not ranges:
        raise ValueError(PORTS_FORMS)
    return ranges


# ---------------------------------------------------------------- settings

class Setting(collections.namedtuple("Setting", "attribute names tools parse default argument help")):
    """One thing a user may set: by the first of `names` found in the environment, or by the option."""
    __slots__ = ()

    @property
    def option(self):
        tool, _, name = self.names[0].partition("_")
        return "--" + (name if tool.lower() in TOOL_NAMES else self.names[0]).lower().replace("_", "-")


def whole_number(low, high):
    def parse(text):
        if not (text.isascii() and text.isdigit() and len(text) <= 12 and low <= int(text) <= high):
            raise ValueError("a whole number from %d to %d" % (low, high))
        return int(text)
    return parse


def seconds(low, high):
    def parse(text):
        try:
            value = float(text) if set(text) <= set("0123456789.") else -1
        except ValueError:
            value = -1
        if not low <= value <= high:
            raise ValueError("seconds, from %g to %g" % (low, high))
        return value
    return parse


def switch(text):
    if text not in ("", "0", "1"):
        raise ValueError("0 or 1")
    return text == "1"


def parse_hosts(text):
    """Numeric addresses, separated by spaces or commas, in the form the system prints them."""
    hosts = []
    for word in text.replace(",", " ").split():
        hosts.append(numeric_address(word))
    return tuple(hosts)


def numeric_address(word):
    address, percent, scope = word.strip("[]").partition("%")
    if percent and not (":" in address and device_name(scope)):
        raise ValueError("numeric addresses, separated by spaces")
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            return socket.inet_ntop(family, socket.inet_pton(family, address)) + ("%" + scope if scope else "")
        except (OSError, ValueError):
            pass
    raise ValueError("numeric addresses, separated by spaces")


def parse_escape(text):
    if text == "none":
        return b""
    if len(text) != 1 or not text.isascii() or not text.isprintable():
        raise ValueError("one printable character, or none")
    return text.encode()


def user_name(text):
    import pwd
    try:
        return pwd.getpwnam(text) if text else None
    except KeyError:
        raise ValueError("the name of a user of this machine") from None


TOOL_NAMES = CEXEC, CSERVICE, CRAT, CPROXY = "cexec", "cservice", "crat", "cproxy"

SETTINGS = (
    Setting("group", ("CEXEC_GROUP", "GROUP"), (CEXEC,), parse_group, "255.255.255.255", "GROUP",
            "where announcements go: [DEVICE:]ADDRESS[:PORT]"),
    Setting("group", ("GROUP",), (CSERVICE, CRAT, CPROXY), parse_group, "255.255.255.255", "GROUP",
            "where announcements are heard: [DEVICE:]ADDRESS[:PORT]"),
    Setting("timeout_accept", ("CEXEC_TIMEOUT_ACCEPT",), (CEXEC,), seconds(0, 1e6), "60", "SECONDS",
            "time to find a worker; 0 waits for ever"),
    Setting("timeout_pingpong", ("CEXEC_TIMEOUT_PINGPONG",), (CEXEC,), seconds(1, 86400), "60", "SECONDS",
            "silence after which a worker is lost"),
    Setting("listen_ports", ("CEXEC_LISTEN_PORTS", "CEXEC_LISTEN_PORT", "CEXEC_PORTS", "CEXEC_PORT"), (CEXEC,),
            lambda text: parse_ports(text) if text else None, "", "PORTS",
            "TCP ports a worker may connect back to: a,b,c and ranges a:b or a-b"),
    Setting("accept_server", ("CEXEC_ACCEPT_SERVER",), (CEXEC,), parse_hosts, "", "ADDRESS", "only this worker"),
    Setting("reject_servers", ("CEXEC_REJECT_SERVERS", "CEXEC_REJECT_SERVER"), (CEXEC,), parse_hosts, "",
            "ADDRESSES", "not these workers, separated by spaces"),
    Setting("max_fd", ("CEXEC_MAXFD", "MAXFD"), (CEXEC,), whole_number(2, 4096), "32", "N",
            "highest descriptor that is carried"),
    Setting("errors_fd", ("CEXEC_FD_FOR_ERRORS",), (CEXEC,),
            lambda text: whole_number(3, 1 << 20)(text) if text else None, "", "N",
            "descriptor, above CEXEC_MAXFD, that gets cexec's own error line"),
    Setting("retries", ("CEXEC_RETRIES",), (CEXEC,), whole_number(0, 100), "3", "N",
            "how often a job that lost its worker before its first output starts again"),
    Setting("spill", ("CEXEC_SPILL",), (CEXEC,), whole_number(0, 1 << 20), "64", "MIB",
            "how much of a pipe's input is kept for starting again"),
    Setting("ratout_test", ("CEXEC_RATOUT_TEST",), (CEXEC,), switch, "", "0|1",
            "send a test alert after finding a worker"),
    Setting("escape", ("CEXEC_ESCAPE",), (CEXEC,), parse_escape, "~", "CHAR",
            "the escape character of -t, or none"),
    Setting("concurrency", ("CONCURRENCY",), (CSERVICE,),
            lambda text: whole_number(1, 10000)(text) if text else usable_cpus(), "", "N",
            "most jobs at once (default: the number of usable CPUs)"),
    Setting("boost", ("BOOST",), (CSERVICE,), lambda text: whole_number(0, 10 ** 9)(text) if text else None, "",
            "MICROSECONDS", "fixed answer delay in place of the load rule"),
    Setting("user", ("CSERVICE_USER",), (CSERVICE,), user_name, "", "NAME",
            "when started as root: whose rights the jobs get"),
    Setting("max_skew", ("CRAT_MAX_SKEW",), (CRAT,), seconds(0, 1e9), "900", "SECONDS",
            "how far an alert's clock may differ from this machine's; 0 takes any"),
    Setting("idle", ("CPROXY_IDLE",), (CPROXY,), seconds(1, 1e6), "300", "SECONDS",
            "silence after which a relayed connection is ended"),
)

FLAGS = {   # options without a value: {option: (attribute, value, tool, help)}
    "-t": ("terminal", 1, CEXEC, "give the job a terminal"),
    "-tt": ("terminal", 2, CEXEC, "give the job a terminal even without a local one"),
    "--json": ("json", True, CRAT, "print one JSON object per line"),
    "--time": ("time", True, CRAT, "put date and time in front of each line"),
}


class Settings:
    """What one run of a tool was told, frozen."""

    def __init__(self, values):
        self.__dict__.update(values)

    def __setattr__(self, name, value):
        raise AttributeError("settings are fixed at the start")


def usable_cpus():
    """The CPUs this process may run on (an affinity mask counts)."""
    try:
        return len(os.sched_getaffinity(0))
    except (AttributeError, OSError):
        return os.cpu_count() or 1


def read_settings(tool, arguments, environment):
    """(Settings, remaining arguments): options first, then the environment, then the defaults."""
    given, flags, rest = _read_options(tool, list(arguments))
    values = dict({attribute: 0 for attribute, _, _, _ in FLAGS.values()}, **flags)
    for setting in SETTINGS:
        if tool in setting.tools:
            name, text = setting.option, given.get(setting.option)
            for variable in setting.names if text is None else ():
                if text is None and environment.get(variable, "") != "":
                    name, text = variable, environment[variable]
            values[setting.attribute] = _parse(setting, name, setting.default if text is None else text)
    return Settings(values), rest


def _parse(setting, name, text):
    try:
        return setting.parse(text)
    except ValueError as error:
        raise Failure("%s=%s" % (name, text), "not accepted", "accepted: %s" % error, EXIT_USAGE) from None


def _read_options(tool, arguments):
    options = {setting.option for setting in SETTINGS if tool in setting.tools}
    given, flags = {}, {}
    while arguments and arguments[0].startswith("-") and arguments[0] != "-":
        word = arguments.pop(0)
        if word == "--":
            break
        name, equals, value = word.partition("=")
        if word in FLAGS and FLAGS[word][2] == tool:
            flags[FLAGS[word][0]] = FLAGS[word][1]
        elif name not in options:
            raise Failure(word, "unknown option", "see %s --help" % tool, EXIT_USAGE)
        elif not equals and not arguments:
            raise Failure(name, "an option without its value", "see %s --help" % tool, EXIT_USAGE)
        else:
            given[name] = value if equals else arguments.pop(0)
    return given, flags, arguments


# ---------------------------------------------------------------- wire
#
# Everything that two machines say to each other, each encoder beside its decoder.  A decoder raises ProtocolError for
# what no encoder could have made, and nothing else.  Numbers are big-endian.

WIRE_VERSION = 2            # one number for datagrams, preamble and session: they change together
MAGIC = b"cxec"
TAG_SIZE = 16
U32_MAX = 0xffffffff         # what is measured and greater is sent as this

ANNOUNCE, HOLD, TAKEN, ALERT, ASK, HERE = 1, 2, 3, 4, 5, 6
DATAGRAM_NAMES = {ANNOUNCE: "announce", HOLD: "hold", TAKEN: "taken", ALERT: "alert", ASK: "ask", HERE: "here"}
DATAGRAM_MAX = 1200         # bytes; fits every link's packet, so nothing is ever fragmented

(WELCOME, HELLO, JOB, ACCEPTED, REFUSED, DATA, END, STOP,
 CREDIT, SIGNAL, WINDOW, PING, PONG, EXIT, ABORT, BYE) = range(16)
MESSAGE_NAMES = dict(enumerate(
    "welcome hello job accepted refused data end stop credit signal window ping pong exit abort bye".split()))


def tag(secret, *parts):
    """HMAC-SHA256 (RFC 2104) over the parts, cut to 16 bytes: forging one needs 2^128 tries in place."""
    return hmac.digest(secret, b"".join(parts), "sha256")[:TAG_SIZE]


def pack_short_texts(texts, longest=255):
    """Texts (str), each behind its length in one byte; cut behind the last character that fits into `longest` bytes."""
    encoded = [text.encode("utf-8", "replace")[:longest].decode("utf-8", "ignore").encode() for text in texts]
    return b"".join(bytes([len(text)]) + text for text in encoded)


def unpack_short_texts(data, at, count):
    """(list of `count` texts, position behind them) of what pack_short_texts wrote."""
    texts = []
    for _ in range(count):
        size = data[at] if at < len(data) else -1
        if not 0 <= size <= len(data) - at - 1:
            raise ProtocolError("a list of texts cut short")
        texts.append(data[at + 1:at + 1 + size].decode("utf-8", "replace"))
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


class Datagram:
    """One datagram, parsed but not yet believed: `authentic` says whether the key's holder made it."""
    __slots__ = ("kind", "port", "key_id", "nonce", "sequence", "body", "data")

    def __init__(self, kind, port, key_id, nonce, sequence, body, data):
        self.kind = kind
        self.port = port
        self.key_id = key_id
        self.nonce = nonce
        self.sequence = sequence
        self.body = body
        self.data = data

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


def with_port(data, port):
    """The same datagram with another port to connect back to: all that a proxy may change."""
    return data[:6] + struct.pack(">H", port) + data[8:]


def unpack_body(form, datagram):
    """The body's fields.  A longer body is a later minor version's and read as far as it is known."""
    if len(datagram.body) < form.size:
        raise ProtocolError("a short %s datagram" % DATAGRAM_NAMES[datagram.kind])
    return form.unpack_from(datagram.body)


ANNOUNCE_BODY = struct.Struct(">HIIB8s")    # attempt; ms waited so far; ms to the next announcement; flags; room
TELL_BUSY = 1               # flag: whoever has no free slot says so
HOLD_BODY = struct.Struct(">H")             # milliseconds
TAKEN_BODY = struct.Struct(">f")            # the new shared offset, NaN for none
ASK_BODY = struct.Struct(">HB")             # ms over which the answers are to be spread; flags
CONNECT = 1                 # flag: try to connect back to the port as well


class Announcement(collections.namedtuple("Announcement", "attempt waited interval flags room")):
    """attempt: counts from 0.  waited, interval: milliseconds.  room: 8 bytes that name the submitting process."""
    __slots__ = ()


def encode_announcement(announcement):
    attempt, waited, interval, flags, room = announcement
    return ANNOUNCE_BODY.pack(min(attempt, 65535), int(min(waited, U32_MAX)), int(interval), flags, room)


def parse_announcement(datagram):
    return Announcement(*unpack_body(ANNOUNCE_BODY, datagram))


def encode_hold(milliseconds):
    return HOLD_BODY.pack(int(milliseconds))


def parse_hold(datagram):
    return unpack_body(HOLD_BODY, datagram)[0]


def encode_taken(offset):
    """offset: the shared offset from now on, or None."""
    return TAKEN_BODY.pack(math.nan if offset is None else offset)


def parse_taken(datagram):
    offset, = unpack_body(TAKEN_BODY, datagram)
    return None if math.isnan(offset) else offset


def encode_ask(spread, flags):
    return ASK_BODY.pack(int(spread), flags)


def parse_ask(datagram):
    """(milliseconds over which to spread the answers, flags)."""
    return unpack_body(ASK_BODY, datagram)


# An alert datagram's body is one or more alerts, one behind the other.
COMPLETED, RATTED_OUT = 1, 2
ALERT_BODY = struct.Struct(">BBIQ")     # verdict; exit status; milliseconds the job took; UNIX time in milliseconds
ALERT_TEXTS = 4
ALERTS_ROOM = DATAGRAM_MAX - DATAGRAM_HEAD.size - TAG_SIZE


class Alert(collections.namedtuple("Alert", "verdict status milliseconds clock job submitter worker words")):
    """What cexec reports about a worker.  Texts are str; addresses are numeric, without port."""
    __slots__ = ()


def encode_alert(alert):
    verdict, status, milliseconds, clock, *texts = alert
    return ALERT_BODY.pack(verdict, status, min(milliseconds, U32_MAX), clock) + pack_short_texts(texts)


def pack_alerts(entries):
    """[body of one datagram, ...] that hold these encoded alerts in order, as many in each as fit."""
    bodies = []
    for entry in entries:
        if not bodies or len(bodies[-1]) + len(entry) > ALERTS_ROOM:
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


FREE, BUSY, DRAINING, VETOED, UNREACHABLE = range(5)
STATE_NAMES = {FREE: "free", BUSY: "busy", DRAINING: "draining", VETOED: "vetoed", UNREACHABLE: "cannot connect"}
# State; slots, running, waiting, CPUs; load, cost; seconds up, jobs done; port it could not connect to.
HERE_BODY = struct.Struct(">BHHHHffIIH")
HERE_TEXTS = 8
HERE_TEXT_MAX = 130         # bytes of one of them: all eight fit a datagram at their longest


class Here(collections.namedtuple(
        "Here", "state slots running waiting cpus load cost up done port "
                "address instance host version python digest command error")):
    """A worker's answer to a roll call, or to an announcement that it cannot serve now.

    state: FREE ... UNREACHABLE.  waiting: submitters it knows of.  load: processes that other work wants to run.
    cost: as in the preamble.  port, error: where it could not connect back and why, if it tried.
    digest: of the command's basename and arguments.
    """
    __slots__ = ()


def encode_here(here):
    short = [min(number, 65535) for number in here[1:5]]
    return HERE_BODY.pack(here.state, *short, here.load, here.cost, int(min(here.up, U32_MAX)),
                          min(here.done, U32_MAX), here.port) + pack_short_texts(here[10:], HERE_TEXT_MAX)


def parse_here(datagram):
    fields = unpack_body(HERE_BODY, datagram)
    if fields[0] not in STATE_NAMES:
        raise ProtocolError("a worker in unknown state %d" % fields[0])
    if not all(map(math.isfinite, fields[5:7])):
        raise ProtocolError("a worker whose load is no number")
    texts, _ = unpack_short_texts(datagram.body, HERE_BODY.size, HERE_TEXTS)
    return Here(*fields, *texts)


# The preamble, the first bytes of a worker's connection, in plain: it lets cexec rank the candidates before any of
# them has cost it a handshake.  The answer is GO, a tag over the very preamble: whoever cannot say it gets no process.
PREAMBLE = struct.Struct(">4sB8sfff?8s")    # magic, version, nonce, cost, offset, wait (ms), from a queue, random
PREAMBLE_SIZE = PREAMBLE.size + TAG_SIZE
GO_SIZE = TAG_SIZE


class Answer(collections.namedtuple("Answer", "nonce cost offset waited queued")):
    """What a worker says when it connects.  waited: milliseconds, 0 where the wait says nothing about the offset.
    queued: whether it had no free slot when its time came."""
    __slots__ = ()


def encode_preamble(secret, answer, random):
    """random: 8 bytes, new for each connection."""
    data = PREAMBLE.pack(MAGIC, WIRE_VERSION, *answer, random)
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
    _, _, *fields, random = PREAMBLE.unpack_from(data)
    if fields[0] != nonce:
        raise ProtocolError("a worker that answers another announcement")
    return Answer(*fields), random


def encode_go(secret, preamble):
    return tag(secret, b"go", preamble)


# Over TLS both sides send messages: type (1 byte), 0 (1), descriptor or number (2), length (4), then so many bytes.

FRAME_HEAD = struct.Struct(">BBHI")
HEAD_SIZE = FRAME_HEAD.size


def frame(kind, number=0, body=b""):
    return FRAME_HEAD.pack(kind, 0, number, len(body)) + body


class FrameReader:
    """Cuts a stream of bytes into messages.  Data comes out as it arrives, in views of the caller's buffer;
    every other message comes out whole, as bytes."""

    def __init__(self):
        self.head = bytearray()
        self.body = bytearray()
        self.kind = None
        self.number = 0
        self.left = 0

    def read(self, data):
        """Yields (type, number, body, bytes announced): for data one or more parts, and the size only with the first
        (an empty part of data opens each message)."""
        view = memoryview(data)
        while True:
            if self.kind is None:
                if not self.head and len(view) >= HEAD_SIZE:
                    head, view = view[:HEAD_SIZE], view[HEAD_SIZE:]
                else:
                    part = view[:HEAD_SIZE - len(self.head)]
                    self.head += part
                    view = view[len(part):]
                    if len(self.head) < HEAD_SIZE:
                        return
                    head, self.head = self.head, bytearray()
                self._open(head)
                if self.kind == DATA:
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

    def _open(self, head):
        kind, zero, self.number, self.left = FRAME_HEAD.unpack(head)
        if kind not in MESSAGE_NAMES or zero:
            raise ProtocolError("a message of unknown type %d" % kind)
        if self.left > (FRAME_MAX if kind == DATA else CONTROL_MAX):
            raise ProtocolError("a %s message of %d bytes" % (MESSAGE_NAMES[kind], self.left))
        self.kind = kind


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


def encode_welcome(address):
    """address: the submitter's own, on the network it speaks from."""
    return pack_texts([b"%d" % WIRE_VERSION, address.encode()])


def parse_welcome(body):
    """The submitter's address, as it says it, without a scope."""
    return parse_own_address(unpack_texts(body), "a welcome")


def encode_hello(address, instance):
    """The worker's first words: its address on the network it called from, and which run of cservice it is."""
    return pack_texts([b"%d" % WIRE_VERSION, address.encode(), instance.encode()])


def parse_hello(body):
    """(address, instance)."""
    texts = unpack_texts(body)
    if len(texts) < 3:
        raise ProtocolError("a hello cut short")
    return parse_own_address(texts, "a hello"), texts[2].decode("ascii", "replace")


def parse_own_address(texts, what):
    address = parse_address(texts[1].decode("ascii", "replace")) if len(texts) > 1 else None
    if not address or address[2]:
        raise ProtocolError("%s without an address" % what)
    return address[0]


# What a job does with a descriptor: reads, writes, both; it is the terminal; it shares another one.
IN, OUT, BOTH, TTY, ALIAS = b"r", b"w", b"b", b"t", b"="
UPWARD, DOWNWARD = (IN, BOTH, TTY), (OUT, BOTH, TTY)
SIGNALS = ("INT", "TERM", "HUP", "QUIT", "USR1", "USR2", "TSTP", "CONT")    # position = number on the wire


class Job(collections.namedtuple("Job", "id descriptors names timeout terminal")):
    """What the submitter asks for.

    id: 16 hexadecimal digits.  descriptors: {number: IN, OUT, BOTH, TTY, or the lower number it shares}.
    names: [(name, value)] as bytes.  timeout: seconds of silence that mean loss.
    terminal: None, or what the TTY is: (rows, columns, type, {mode: number}), type and modes as bytes.
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
                       pack_texts(terminal), pack_texts([name + b"=" + value for name, value in job.names])])


def parse_job(data):
    texts = unpack_texts(data)
    if len(texts) < 5:
        raise ProtocolError("a job cut short")
    identity, descriptors, timeout, terminal, names = texts[:5]
    if len(identity) != 16 or identity.strip(b"0123456789abcdef"):
        raise ProtocolError("a job without a proper id")
    names = unpack_texts(names)
    pairs = [text.partition(b"=")[::2] for text in names]
    for text, (name, value) in zip(names, pairs):
        if b"=" not in text or not is_name(name) or b"\0" in value:
            raise ProtocolError("a job with an improper NAME=VALUE")
    terminal = _parse_terminal(unpack_texts(terminal))
    return Job(identity.decode(), _parse_descriptors(descriptors, terminal), pairs,
               _whole(timeout, 1, 86400000) / 1000, terminal)


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
EXIT_BODY = struct.Struct(">BBHIII")    # 1 if a signal ended it; 1 if last; status or signal; ms; CPU ms; peak KiB
EXIT_COUNT = struct.Struct(">HQ")       # input, bytes of it that the job has read
SIGNAL_NAMES = {number.name[3:]: number for number in signal.Signals}


class ExitReport(collections.namedtuple("ExitReport", "signalled last number milliseconds cpu peak name consumed")):
    """How a job ended.

    last: whether the worker takes no more jobs on this connection.  number: the status, or the signal's number there.
    name: the signal's, for systems that number them otherwise.  cpu: milliseconds.  peak: KiB.
    consumed: {descriptor: bytes of that input that the job has read, or UNKNOWN}.
    """
    __slots__ = ()

    @property
    def status(self):
        """What a shell would report: the exit status, or 128 and the signal."""
        return 128 + SIGNAL_NAMES.get(self.name, self.number) if self.signalled else self.number


def encode_exit(report):
    measured = [min(number, U32_MAX) for number in report[3:6]]
    return (EXIT_BODY.pack(report.signalled, report.last, report.number, *measured) + pack_short_texts([report.name])
            + b"".join(EXIT_COUNT.pack(*item) for item in report.consumed.items()))


def parse_exit(data):
    if len(data) < EXIT_BODY.size:
        raise ProtocolError("an exit message cut short")
    signalled, last, number, *measured = EXIT_BODY.unpack_from(data)
    if max(signalled, last) > 1 or not signalled <= number <= (127 if signalled else 255):
        raise ProtocolError("an exit message of a status that does not exist")
    (name,), at = unpack_short_texts(data, EXIT_BODY.size, 1)
    count, rest = divmod(len(data) - at, EXIT_COUNT.size)
    consumed = dict(EXIT_COUNT.iter_unpack(data[at:len(data) - rest]))
    if rest or len(consumed) < count or max(consumed, default=0) > DESCRIPTOR_MAX:
        raise ProtocolError("an exit message with improper counts")
    return ExitReport(bool(signalled), bool(last), number, *measured, name, consumed)


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
    extracted = hmac.new(salt or bytes(32), secret, hashlib.sha256).digest()
    output = block = b""
    for counter in range(1, (length + 31) // 32 + 1):
        block = hmac.new(extracted, block + info + bytes([counter]), hashlib.sha256).digest()
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


def base_powers(powers=[]):
    """The base point times 16^0 ... 16^63, worked out at the first call only (about a millisecond)."""
    if not powers:
        point = P256_G + (1,)
        for _ in range(64):
            powers.append(point)
            for _ in range(4):
                point = point_add(point, point)
    return powers


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


def public_point(scalar):
    """The 65 bytes (uncompressed) of the public key that belongs to SCALAR."""
    x, y = base_times(scalar)
    return b"\x04" + x.to_bytes(32, "big") + y.to_bytes(32, "big")


def ecdsa_nonces(scalar, digest):
    """The candidates for k of RFC 6979 with SHA-256, in order; all but the first are for one case in 2^32."""
    seed = scalar.to_bytes(32, "big") + (int.from_bytes(digest, "big") % P256_N).to_bytes(32, "big")
    key, value = bytes(32), b"\x01" * 32
    for separator in (b"\x00", b"\x01"):
        key = hmac.new(key, value + separator + seed, hashlib.sha256).digest()
        value = hmac.new(key, value, hashlib.sha256).digest()
    while True:
        value = hmac.new(key, value, hashlib.sha256).digest()
        if 0 < int.from_bytes(value, "big") < P256_N:
            yield int.from_bytes(value, "big")
        key = hmac.new(key, value + b"\x00", hashlib.sha256).digest()
        value = hmac.new(key, value, hashlib.sha256).digest()


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
    labels, blocks = [], []
    if len(text) > KEY_FILE_LIMIT:
        raise ProtocolError("it is too large")
    if b"\r" in text:
        raise ProtocolError("its lines end in CR LF: a copy by way of Windows, or as text, has changed it")
    for part in text.split(b"-----BEGIN ")[1:]:
        label, _, body = part.partition(b"-----\n")
        try:
            blocks.append(binascii.a2b_base64(body.partition(b"-----END ")[0]))
        except ValueError:
            raise ProtocolError("its base64 is damaged or cut short") from None
        labels.append(label)
    if not blocks:
        raise ProtocolError("it holds no key at all")
    pairs = zip(text.splitlines(True) + [None], pem_text(labels, blocks).splitlines(True) + [None])
    for number, (found, written) in enumerate(pairs, 1):
        if found != written:
            raise ProtocolError("line %d is not as ckeygen wrote it: a line too many or too few, or an edit" % number)
    if tuple(labels) not in (PRIVATE_LABELS, PUBLIC_LABELS):
        short = tuple(labels) in (PRIVATE_LABELS[:len(labels)], PUBLIC_LABELS[:len(labels)])
        raise ProtocolError("its end is missing" if short else "it holds something else")
    checksum = blocks.pop()
    if hashlib.sha256(pem_text(labels, blocks)).digest() != checksum:
        raise ProtocolError("it is damaged: its checksum does not fit")
    return tuple(labels), blocks


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
    point = public_point(scalar)
    return [private_block(scalar, point), certificate(role, point, ecdsa_sign(scalar, certificate_body(role, point)))]


def make_keypair(master):
    """(private half, public half) as the bytes of their files, from 32 secret bytes."""
    scalars = [1 + int.from_bytes(hkdf(master, role, 48), "big") % (P256_N - 1) for role in (WORKER_ROLE, CLIENT_ROLE)]
    private = key_text(PRIVATE_LABELS, identity(WORKER_ROLE, scalars[0]) + identity(CLIENT_ROLE, scalars[1]))
    return private, public_half(private)


def public_half(private):
    """The bytes of APP.pub from those of a valid APP: the client's two blocks and the worker's certificate."""
    _, (_, worker_certificate, *client) = key_blocks(private)
    return key_text(PUBLIC_LABELS, client + [worker_certificate])


def master_from_pieces(pieces):
    """The 32 secret bytes that a text stands for, a phrase or a program; Failure when it is too easy to guess.

    The text comes in pieces and may have any size: what scrypt gets is its SHA-512. The rule for phrases is simple and
    knows no dictionary: PHRASE_BYTES that are not white space, PHRASE_KINDS of them different.
    """
    digest, start = hashlib.sha512(), b""
    for piece in pieces:
        digest.update(piece)
        start += piece[:PHRASE_START - len(start)]
    marks = b"".join(start.split())
    if len(marks) < PHRASE_BYTES or len(set(marks)) < PHRASE_KINDS:
        raise Failure("the text is too easy to guess",
                      "it needs %d characters besides white space, %d of them different" % (PHRASE_BYTES, PHRASE_KINDS),
                      "use a sentence that only your group knows, or a program", EXIT_USAGE)
    return stretch(digest.digest())


def stretch(digest):
    """32 bytes from DIGEST by scrypt, which makes every guess dear."""
    elsewhere = "make the key on another machine and copy it"
    if not hasattr(hashlib, "scrypt"):
        raise Failure("cannot make a key from text", "this Python was built without scrypt", elsewhere)
    try:
        return hashlib.scrypt(digest, salt=SCRYPT_SALT, n=SCRYPT_COST, r=8, p=1, maxmem=SCRYPT_MEMORY, dklen=32)
    except (ValueError, MemoryError) as problem:
        if isinstance(problem, MemoryError) or "malloc" in str(problem):
            why, hint = "out of memory", "scrypt takes 128 MiB; try again, or " + elsewhere
        else:
            why, hint = "OpenSSL refuses scrypt here (%s)" % problem, "a policy such as FIPS forbids it; " + elsewhere
        raise Failure("cannot make a key from text", why, hint) from None


class Key:
    """What the tools need of one half of a key.

    path         the file, for load_cert_chain: its first two blocks are this half's own identity
    name         the key as the user named it, for logs
    private      whether this is the private half (own is the worker, peer is the client; else the reverse)
    id           4 bytes that name the key in datagrams: the start of the SHA-256 of the worker's certificate
    fingerprint  the same hash for people, 16 bytes of it
    udp          32 bytes that authenticate datagrams
    own_der, peer_der, peer_pem   the certificates to show and to demand (peer_pem is a str, for cadata=)
    """

    __slots__ = ("path", "name", "private", "id", "fingerprint", "udp", "own_der", "peer_der", "peer_pem")

    def __init__(self, path, private, blocks):
        self.path = self.name = path
        self.private = private
        self.own_der, self.peer_der = blocks[1], blocks[-1]
        digest = hashlib.sha256(self.own_der if private else self.peer_der).digest()
        self.id = digest[:4]
        self.fingerprint = "SHA256:" + digest[:16].hex()
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
# Pure: bytes and times in, events and bytes out.  A session has a phase; a message moves it along the table, and
# a message that has no entry for the role and the phase is an error.  In the phases STARTING and RUNNING each
# descriptor has up to two streams, which open, stop and end each by itself.

SUBMITTER, WORKER = "submitter", "worker"
GREETING, CHOSEN, IDLE, OFFERED, STARTING, RUNNING, ENDED, OVER = (
    "greeting", "chosen", "idle", "offered", "starting", "running", "ended", "over")


def _table():
    table = {
        (SUBMITTER, GREETING, HELLO): IDLE,
        (SUBMITTER, OFFERED, ACCEPTED): RUNNING,
        (SUBMITTER, OFFERED, REFUSED): OVER,
        (SUBMITTER, RUNNING, EXIT): OVER,
        (SUBMITTER, RUNNING, ABORT): OVER,
        (WORKER, GREETING, WELCOME): CHOSEN,
        (WORKER, CHOSEN, JOB): STARTING,
        (WORKER, ENDED, BYE): OVER,
    }
    for kind in (DATA, END, STOP, CREDIT, PING, PONG):
        table[SUBMITTER, RUNNING, kind] = RUNNING
    for kind in (DATA, END, STOP, CREDIT, PING, PONG, SIGNAL, WINDOW):
        for phase in (STARTING, RUNNING, ENDED):    # the submitter goes on until it has heard of the end
            table[WORKER, phase, kind] = phase
    for kind in (PING, PONG):
        table[SUBMITTER, IDLE, kind] = IDLE
        table[SUBMITTER, OFFERED, kind] = OFFERED
    return table


PHASES = _table()


class Stream:
    """One direction of one descriptor.  state: "open", "stopped" (nobody reads any more) or "ended"."""
    __slots__ = ("state", "credit", "window", "returned", "stamp")

    def __init__(self):
        self.state = "open"
        self.credit = WINDOW_START      # bytes that may still be sent
        self.window = WINDOW_START      # receiver: credit given out in all when everything is consumed
        self.returned = 0               # receiver: consumed, not yet given back
        self.stamp = 0.0                # receiver: when credit was last given back


class Session:
    """One job's conversation, one side of it.

    receive(bytes, now) yields events (type, number, body); what must go to the peer gathers in `outbox`.
    now is monotonic seconds.  After ProtocolError the session is OVER.
    """

    def __init__(self, role, timeout, now):
        self.role, self.timeout, self.phase = role, timeout, GREETING
        self.reader, self.outbox = FrameReader(), bytearray()
        self.sending, self.receiving = {}, {}
        self.heard, self.pinged, self.ticked, self.round_trip, self.paused = now, now, now, None, False

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
                event = self.HANDLERS[kind](self, kind, number, body, size, now)
                if event:
                    yield event
                if phase is OVER:
                    return
        except ProtocolError:
            self.phase = OVER
            raise

    def _pass_on(self, kind, number, body, size, now):
        return kind, number, body

    def _job(self, kind, number, body, size, now):
        job = parse_job(body)
        self.open_streams(job.descriptors)
        self.timeout = job.timeout
        return kind, number, job

    def _exit(self, kind, number, body, size, now):
        return kind, number, parse_exit(body)

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
        stream = self._stream(self.sending, number)
        if stream.state != "open":
            return None         # it crossed our own end
        self.end(number)
        return STOP, number, b""

    def _credit(self, kind, number, body, size, now):
        stream = self._stream(self.sending, number)
        if len(body) != 4:
            raise ProtocolError("a credit message of %d bytes" % len(body))
        stream.credit += struct.unpack(">I", body)[0]
        if stream.credit > WINDOW_MAX:
            raise ProtocolError("credit beyond %d on descriptor %d" % (WINDOW_MAX, number))
        return CREDIT, number, b""

    def _signal(self, kind, number, body, size, now):
        if number >= len(SIGNALS):
            raise ProtocolError("signal %d, which is not passed on" % number)
        name = SIGNALS[number]
        self.paused = name == "TSTP" or (self.paused and name != "CONT")
        return SIGNAL, number, name

    def _window(self, kind, number, body, size, now):
        if len(body) != 4:
            raise ProtocolError("a window message of %d bytes" % len(body))
        return WINDOW, number, struct.unpack(">HH", body)

    def _ping(self, kind, number, body, size, now):
        if len(self.outbox) < CONTROL_MAX // 2:     # who pings without reading gets no more answers
            self.outbox += frame(PONG, 0, body[:8])

    def _pong(self, kind, number, body, size, now):
        if len(body) == 8:
            trip = now - struct.unpack(">d", body)[0]
            if trip >= 0:
                self.round_trip = trip if self.round_trip is None else min(trip, self.round_trip)

    HANDLERS = {WELCOME: _pass_on, HELLO: _pass_on, JOB: _job, ACCEPTED: _pass_on, REFUSED: _pass_on, ABORT: _pass_on,
                BYE: _pass_on, DATA: _data, END: _end, STOP: _stop, CREDIT: _credit, SIGNAL: _signal, WINDOW: _window,
                PING: _ping, PONG: _pong, EXIT: _exit}

    # -- to the peer
    def open_streams(self, descriptors):
        """Streams for a job's descriptors, as {number: kind}."""
        upward, downward = ((self.sending, self.receiving) if self.role is SUBMITTER else
                            (self.receiving, self.sending))
        for fd, kind in descriptors.items():
            if kind in UPWARD:
                upward[fd] = Stream()
            if kind in DOWNWARD:
                downward[fd] = Stream()

    def hello(self, address, instance):
        """The worker's first words: its address on the network it called from, and which run of cservice it is."""
        self.outbox += frame(HELLO, 0, encode_hello(address, instance))

    def offer(self, job, address):
        """The submitter's choice falls on this worker."""
        self.outbox += frame(WELCOME, 0, encode_welcome(address))
        self.outbox += frame(JOB, 0, encode_job(job))
        self.open_streams(job.descriptors)
        self.phase = OFFERED

    def accept(self, now):
        self.outbox += frame(ACCEPTED)
        self.phase = RUNNING
        self.ping(now)

    def refuse(self, words):
        self.outbox += frame(REFUSED, 0, words.encode("utf-8", "replace")[:1000])
        self.phase = OVER

    def abort(self, words):
        """The worker gives the job up: the submitter's user reads the words."""
        self.outbox += frame(ABORT, 0, words.encode("utf-8", "replace")[:1000])
        self.phase = OVER

    def exit(self, ended):
        self.outbox += frame(EXIT, 0, encode_exit(ended))
        self.phase = ENDED

    def bye(self):
        self.outbox += frame(BYE)

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
        return min(stream.credit, FRAME_MAX) if stream.state == "open" else 0

    def data(self, buffer, at, number, size):
        """Writes the header of a data message into the buffer; its `size` bytes follow there already."""
        self.sending[number].credit -= size
        FRAME_HEAD.pack_into(buffer, at, DATA, 0, number, size)

    def end(self, number):
        stream = self.sending[number]
        if stream.state == "open":
            stream.state = "ended"
            self.outbox += frame(END, number)

    def stop(self, number):
        """Nobody here reads this descriptor's data any more."""
        stream = self.receiving[number]
        if stream.state == "open":
            stream.state = "stopped"
            self.outbox += frame(STOP, number)

    def consumed(self, number, size, now):
        """So much data has left this process: its credit goes back in quarters of the window."""
        stream = self.receiving[number]
        stream.returned += size
        if stream.state != "open" or stream.returned < stream.window // 4:
            return
        extra = self._growth(stream, now)
        stream.window += extra
        stream.stamp = now
        self.outbox += frame(CREDIT, number, struct.pack(">I", stream.returned + extra))
        stream.credit += stream.returned + extra
        stream.returned = 0

    def _growth(self, stream, now):
        """A quarter consumed in less than half a long round trip: the window, not the consumer, is what limits."""
        trip = self.round_trip or 0
        if trip < 0.005 or now - stream.stamp > trip / 2 or stream.window >= WINDOW_MAX:
            return 0
        total = sum(other.window for other in self.receiving.values())
        return stream.window if total + stream.window <= WINDOWS_MAX else 0

    # -- silence
    def tick(self, now):
        """Pings a peer that is silent; returns whether it has been for too long.  Called several times per timeout."""
        asleep, self.ticked = now - self.ticked > self.timeout / 2, now
        if self.paused or asleep:       # a peer that was suspended, or this process itself was: silence proves nothing
            self.heard = now
            if self.paused:
                return False
        quiet = now - self.heard
        if quiet > self.timeout / 4 and now - self.pinged > self.timeout / 4:
            self.ping(now)
        return quiet > self.timeout


# ---------------------------------------------------------------- choice: which worker runs the job
#
# Every worker hears an announcement and sets a timer that grows with its cost, plus a little chance. The first ones to
# fire connect; the submitter tells the rest to hold, takes the first good one and tells all that the job is taken.
# A shared offset is added to all timers: submitters compute it from what they saw and workers remember it, so it
# follows the size, load and speed of the cluster, which nobody needs to know. Times are milliseconds.

CHANCE = 3.0            # scale of the random part: about the time from the first connection until all have heard of it
PER_COST = 48.0         # delay per unit of cost (cost is a logarithm: twice as loaded or half as fast waits 33 ms more)
OFFSET_UNSET = 18.0     # a worker that has heard nothing yet does not know how many others it would collide with
OFFSET_RANGE = (-150.0, 120.0)   # what a taken message can do at worst; a few jobs later it is mended
HIGH_HALF_LIFE = 600e3  # the highest offset is forgotten by halves
QUIET = 2000.0          # after so long without a job the cluster may have become idle, so start near the highest offset
QUIET_REST = 6.0
SETTLED = 0.2           # a wait that has grown by less than this since the timer was set does not matter
HOLD_TIME = 20.0        # longer than a handshake on a busy machine, too short for a stalled worker to be noticed
HOLD_MOST = 1000.0
SPEAK_GAP = 0.3         # holds and takens closer together than this tell nothing new
LOAD_LAG = 5000.0       # the outside load is smoothed over this time
PENALTY = 3.0           # added to the cost of a ratted-out worker: any other goes first, a lone one still serves
PER_SOURCE = 128        # announcements remembered for one submitting host, the oldest jobs first
PENDING_MOST = 1024       # and in all; each event looks through them, which takes a tenth of a millisecond at worst
ANSWERED_MOST = 1024       # nonces that get no second connection
FORGET = 2.5            # a waiting submitter not heard for so many of its intervals is gone
INTERVAL_RANGE = (40.0, 10000.0)
CONNECT_GAP = 1.0       # connections per worker: a thousand in a second, so that nobody can use workers as a hammer
CONNECT_BURST = 64

AGAIN_FIRST = 20.0      # announcements: 20 ms, 40, 80 ... apart
AGAIN_MOST = 4000.0     # a worker that starts now finds who waits within this; 100 waiting hosts send 25 a second
AGAIN_JITTER = 0.25
HANDSHAKES = 4          # at once: more would slow the first one
PATIENCE = 20.0         # a handshake older than this makes room for a connection that waits
PATIENCE_GROWTH = 1.25  # each time, for in a distant cluster every handshake takes longer
CANDIDATES = 64         # connections that are kept at once
PREFER_GAP = 0.1        # a connected worker that is cheaper by this is worth waiting for
PREFER_WAIT = 1.5
TAKEN_AGAIN = (4.0, 8.0)    # before the hold runs out
CROWDED = 2.0           # more than two connections are too many: the offset rises by this, times the log of the ratio

SERVED, LEARNT = 1 << 40, 1 << 41   # beyond any attempt: the announcement is over; and its offset has been used



def clamp(value, low, high):
    """value between low and high; low for what is no number."""
    return min(value, high) if value >= low else low


class PendingAnnouncement:
    """One announcement as one worker remembers it."""
    __slots__ = "nonce source attempt since until base jitter cost wait fire queued".split()

    def __init__(self, nonce, source, since):
        self.nonce, self.source, self.since = nonce, source, since
        self.queued = False


class Responder:
    """When one worker answers which announcement.

    slots, cores: jobs at once, processors; speed: 1.0 is usual; uniform() returns a number in (0, 1];
    boost: a fixed delay in microseconds in place of the load rule. running counts jobs and reserved slots."""

    def __init__(self, slots, cores, speed, uniform, boost=None):
        self.slots, self.cores, self.speed, self.uniform, self.boost = slots, cores, speed, uniform, boost
        self.running = 0
        self.calls = collections.OrderedDict()      # nonce -> Call, the least recently heard first
        self.answered = collections.OrderedDict()      # nonce -> the last attempt that gets no answer any more
        self.answers = {}                              # nonce -> attempt, for connections under way
        self.offset = OFFSET_UNSET + PER_COST * math.log(speed)
        self.offset_high = self.offset_at = None
        self.outside, self.outside_at = 0.0, None
        self.penalty_until = -math.inf
        self.next_connect_at = -math.inf

    def load(self, now, outside):
        """Take one sample of how many processes, the own jobs left out, want a processor."""
        blend = 1.0 if self.outside_at is None else 1 - math.exp((self.outside_at - now) / LOAD_LAG)
        self.outside += blend * (clamp(outside, 0.0, 1e6) - self.outside)
        self.outside_at = now

    def penalise(self, now, ms):
        """Hold back for ms; 0 ends it."""
        self.penalty_until = now + ms

    def announced(self, now, nonce, source, attempt, waited, interval):
        """Heard an announcement: attempt counts from 0; its submitter has waited so long, repeats after interval."""
        if nonce in self.answers or attempt <= self.answered.get(nonce, -1):
            return
        call = self.calls.get(nonce)
        if call is None:
            self._make_room(now, source)
            call = self.calls[nonce] = PendingAnnouncement(nonce, source, now - clamp(waited, 0.0, 1e9))
            self._rise_when_quiet(now)
            self._wait(now, now, call)
        elif attempt <= call.attempt:
            return
        call.attempt = attempt
        call.until = now + FORGET * clamp(interval, *INTERVAL_RANGE)
        self.calls.move_to_end(nonce)

    def hold(self, now, nonce, ms):
        """Another worker has connected: answer ms later, if it is still needed then."""
        call = self.calls.get(nonce)
        if call is None:
            return
        end = now + clamp(ms, 0.0, HOLD_MOST)
        if call.queued:
            call.fire = end
        else:
            self._wait(now, end, call)

    def taken(self, now, nonce, offset):
        """The job has found its worker; offset: the shared offset from now on, or None."""
        self.calls.pop(nonce, None)
        usable = offset is not None and offset == offset
        if usable and self.answered.get(nonce) != LEARNT:
            self._learn(now, clamp(offset, *OFFSET_RANGE))
        self._spend(nonce, LEARNT if usable else SERVED)

    def due(self, now):
        """The connections to make now. Each has reserved a slot until won and freed, or lost."""
        full = self.running >= self.slots
        expired = [call for call in self.calls.values() if call.fire <= now and not (full and call.queued)]
        self.next_connect_at = max(self.next_connect_at, now - CONNECT_BURST * CONNECT_GAP)
        answers = []
        for call in sorted(expired, key=lambda call: call.since):
            if call.until <= now:
                del self.calls[call.nonce]
            elif self.running >= self.slots:
                call.queued = True
            elif self.next_connect_at <= now and (call.queued or self._settled(now, call)):
                answers.append(self._answer(call))
        return answers

    def next_due(self):
        """When to ask due() again, or None."""
        full = self.running >= self.slots
        times = [call.fire for call in self.calls.values() if not (full and call.queued)]
        return max(min(times), self.next_connect_at) if times else None

    def won(self, nonce):
        """The connection for nonce has become a job, which keeps the slot until freed()."""
        self._close(nonce, SERVED)

    def lost(self, nonce, refused=False):
        """The connection for nonce ended without a job; refused: nobody listens there any more."""
        self._close(nonce, SERVED if refused else 0)
        self.running -= 1

    def freed(self):
        """A job has ended."""
        self.running -= 1

    def _cost(self, now):
        if self.boost is not None:
            return 0.0
        used = self.running * (1 / self.slots + 1 / self.cores) / 2 + self.outside / self.cores
        return math.log((1 + used) / self.speed) + (PENALTY if now < self.penalty_until else 0.0)

    def _delay(self, call):
        if self.boost is not None:
            return self.boost / 1000.0
        return max(0.0, self.offset + PER_COST * call.cost + call.jitter)

    def _wait(self, now, base, call):
        """Set the timer of call: a fresh wait that begins at base."""
        call.jitter = CHANCE * math.log(self.uniform())
        call.base, call.cost = base, self._cost(now)
        call.wait = self._delay(call)
        call.fire = base + call.wait

    def _settled(self, now, call):
        """The timer has fired. False if load or offset have risen meanwhile, so that it has to wait on."""
        call.cost = self._cost(now)
        call.wait = self._delay(call)
        call.fire = call.base + call.wait
        return call.fire <= now + SETTLED

    def _answer(self, call):
        del self.calls[call.nonce]
        self.answers[call.nonce] = call.attempt
        self.running += 1
        self.next_connect_at += CONNECT_GAP
        waited = 0.0 if self.boost is not None else call.wait   # a fixed wait says nothing about the offset
        return Answer(call.nonce, call.cost, self.offset, waited, call.queued)

    def _close(self, nonce, attempt):
        """The connection is over. A later attempt may be answered again: the submitter is still looking."""
        self._spend(nonce, max(attempt, self.answers.pop(nonce)))

    def _spend(self, nonce, attempt):
        self.answered[nonce] = max(attempt, self.answered.get(nonce, 0))
        if len(self.answered) > ANSWERED_MOST:
            self.answered.popitem(last=False)

    def _make_room(self, now, source):
        """Before one more announcement of source: those that are gone or young go first."""
        if len(self.calls) < PER_SOURCE:
            return
        same = [call for call in self.calls.values() if call.source == source]
        if len(same) >= PER_SOURCE:
            last = max(same, key=lambda call: (call.until <= now, call.since))
            del self.calls[last.nonce]
        elif len(self.calls) >= PENDING_MOST:
            self.calls.popitem(last=False)

    def _rise_when_quiet(self, now):
        if self.offset_at is not None and now - self.offset_at > QUIET:
            self.offset = max(self.offset, self.offset_high - QUIET_REST)

    def _learn(self, now, offset):
        above = 0.0
        if self.offset_at is not None:
            above = max(0.0, self.offset_high - offset) * 2 ** ((self.offset_at - now) / HIGH_HALF_LIFE)
        self.offset, self.offset_high, self.offset_at = offset, offset + above, now


class Candidate:
    """One worker that has connected. began: when its handshake was started, or None."""
    __slots__ = "who cost offset waited queued began good".split()

    def __init__(self, *offer):
        self.who, self.cost, self.offset, self.waited, self.queued = offer
        self.began, self.good = None, False


class Selection:
    """Which of the workers that connect gets one job, and what the cluster is told.

    Call poll() after every event and when next_due() has come, also for a while after the choice."""

    def __init__(self, now, uniform):
        self.uniform, self.since = uniform, now
        self.restart(now)

    def restart(self, now):
        """Begin a new round, under a new nonce: the worker chosen did not start the job."""
        self.attempt, self.again = 0, now
        self.candidates = {}        # who -> Candidate, in the order of arrival
        self.connections = 0
        self.winner = None
        self.choose_by = None
        self.patience = PATIENCE
        self.spoke = -math.inf
        self.repeats = []
        self.actions = []

    def connected(self, now, who, cost, offset, waited, queued):
        """A worker has connected and said in its preamble what its Bid was."""
        candidate = Candidate(who, clamp(cost, -20.0, 20.0), clamp(offset, *OFFSET_RANGE), clamp(waited, 0.0, 1e3),
                              queued)
        self.connections += 1
        if self.winner or len(self.candidates) >= CANDIDATES:
            self.actions.append(("evict", who))
        else:
            self.candidates[who] = candidate
        if now - self.spoke >= SPEAK_GAP:
            self._speak(now)

    def authenticated(self, now, who):
        """The handshake is done and the worker is one of ours."""
        if who in self.candidates:
            self.candidates[who].good = True
            if self.choose_by is None:
                self.choose_by = now + PREFER_WAIT

    def closed(self, now, who):
        """The connection is gone, whoever ended it."""
        self.candidates.pop(who, None)

    def poll(self, now):
        """What to do now, in this order; each is one of ("announce", attempt, waited, interval), ("hold", ms),
        ("taken", offset or None), ("handshake", who), ("evict", who), ("win", who)."""
        if not self.winner:
            self._choose(now)
        if not self.winner:
            self._make_room(now)
            self._handshake(now)
            if self.again <= now:
                self._announce(now)
        elif self.repeats and self.repeats[0] <= now:
            self.repeats.pop(0)
            self._speak(now)
        actions, self.actions = self.actions, []
        return actions

    def next_due(self):
        """When to call poll() again, or None."""
        if self.actions:
            return self.since
        if self.winner:
            return self.repeats[0] if self.repeats else None
        times = [self.again]
        if any(candidate.good for candidate in self.candidates.values()):
            times.append(self.choose_by)
        oldest = self._oldest()
        if oldest and len(self.candidates) > HANDSHAKES:
            times.append(oldest.began + self.patience)
        return min(times)

    def _choose(self, now):
        good = [candidate for candidate in self.candidates.values() if candidate.good]
        if not good:
            return
        best = min(good, key=lambda candidate: candidate.cost)
        hoped = any(other.began is not None and other.cost < best.cost - PREFER_GAP
                    for other in self.candidates.values())
        if hoped and now < self.choose_by:
            return
        self.winner = best
        self._speak(now)
        self.repeats = [now + later for later in TAKEN_AGAIN]
        self.actions.append(("win", best.who))
        self.actions.extend(("evict", who) for who in self.candidates if who != best.who)
        self.candidates = {}

    def _speak(self, now):
        self.spoke = now
        self.actions.append(("taken", self._offset()) if self.winner else ("hold", HOLD_TIME))

    def _offset(self):
        """The offset for the next job: down by half of what the winner waited, never so far that idler workers would
        all fire at once, and up when many connected. A winner from a queue tells nothing."""
        best = self.winner
        if best.queued:
            return None
        base = max(best.offset - best.waited / 2, -PER_COST * best.cost)
        return base + CROWDED * max(0.0, math.log(self.connections / 2))

    def _oldest(self):
        """The handshake that makes room first, if any."""
        begun = [c for c in self.candidates.values() if c.began is not None and not c.good]
        return min(begun, key=lambda candidate: candidate.began, default=None)

    def _make_room(self, now):
        oldest = self._oldest()
        if oldest and len(self.candidates) > HANDSHAKES and now >= oldest.began + self.patience:
            del self.candidates[oldest.who]
            self.actions.append(("evict", oldest.who))
            self.patience *= PATIENCE_GROWTH

    def _handshake(self, now):
        for candidate in list(self.candidates.values())[:HANDSHAKES]:
            if candidate.began is None:
                candidate.began = now
                self.actions.append(("handshake", candidate.who))

    def _announce(self, now):
        spread = 1 + AGAIN_JITTER * (2 * self.uniform() - 1)
        interval = spread * min(AGAIN_MOST, AGAIN_FIRST * 2 ** min(self.attempt, 20))
        self.actions.append(("announce", self.attempt, now - self.since, interval))
        self.attempt += 1
        self.again = now + interval


# ================================================================ below this line the program touches the world

# ---------------------------------------------------------------- TLS

def tls_context(key, server_side):
    """TLS 1.3 (RFC 8446) only, both sides with a certificate, trusting nobody but the key's other half."""
    global ssl
    import ssl
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server_side else ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False      # names mean nothing here: the certificate itself is pinned
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_cert_chain(key.path)
        context.load_verify_locations(cadata=key.peer_pem)
    except (ValueError, ssl.SSLError, OSError) as error:
        raise Failure(key.path, "no TLS 1.3 channel can be made of it: %s" % reason_of(error),
                      "either the file is damaged or this machine's policy forbids TLS 1.3 or P-256") from None
    if server_side:
        context.num_tickets = 0         # a ticket that crosses a close resets the connection and loses its tail
    return context


def check_peer(connection, key):
    """ssl.SSLError unless the finished handshake is TLS 1.3 with exactly the pinned certificate."""
    if connection.version() != "TLSv1.3" or connection.getpeercert(True) != key.peer_der:
        raise ssl.SSLError("the peer shows another certificate")


def tune(connection):
    """Small messages go at once; a peer whose machine has gone is noticed in two minutes though it may be silent."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if MACOS:
        connection.setsockopt(socket.IPPROTO_TCP, 0x10, 60)     # TCP_KEEPALIVE, what others call TCP_KEEPIDLE
    for name, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


# ---------------------------------------------------------------- event loop

def has_room():
    """Whether a line can be written to standard error without waiting for who reads it."""
    return bool(select.select([], [2], [], 0)[1])


class Timer:
    """One call in the future; cancel() is for ever and may be repeated."""
    __slots__ = ("when", "callback")

    def __init__(self, when, callback):
        self.when, self.callback = when, callback

    def __lt__(self, other):
        return self.when < other.when

    def cancel(self):
        self.callback = None


class Loop:
    """Descriptors, timers, signals and wake-ups from threads, as calls in one thread.  Times are monotonic seconds.

    select rather than epoll: it waits for microseconds where the others round up to milliseconds, leaves no state in
    the kernel that a forked child would share, and macOS can wait for terminals with nothing else.  The first
    descriptor that is too high for it changes the loop to poll.
    """

    def __init__(self):
        self.reads, self.writes, self.poll = {}, {}, None       # {descriptor: what to call}; poll once it is needed
        self.timers, self.calls, self.signals, self.old_handlers = [], collections.deque(), {}, {}
        self.result, self.running = None, True
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
        heapq.heappush(self.timers, timer)
        return timer

    def call_later(self, seconds, callback):
        return self.call_at(time.monotonic() + seconds, callback)

    def on_signal(self, number, callback):
        """callback(number) in the loop for every delivery of the signal; None restores what was there before."""
        if callback is None:
            self.signals.pop(number, None)
            if number in self.old_handlers:
                signal.signal(number, self.old_handlers.pop(number))
            return
        if not self.signals:
            signal.set_wakeup_fd(self.wake_out, warn_on_full_buffer=False)
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
        while self.running:
            self.step()
        return self.result

    def stop(self, result=None):
        self.result, self.running = result, False

    def step(self):
        """Waits for the next thing that happens and makes its calls."""
        for calls, ready in zip((self.reads, self.writes), self._ready(self._patience())):
            for fd in ready:
                call = calls.get(fd)    # an earlier call of this round may have changed its mind about this descriptor
                if call:
                    call()
        self._due()
        for _ in range(len(self.calls)):    # what these add waits until descriptors and timers have had their turn
            self.calls.popleft()()

    def _ready(self, patience):
        """(descriptors to read, descriptors to write); what is broken is ready for both."""
        if not self.poll:
            return select.select(self.reads, self.writes, (), patience)[:2]
        found = self.poll.poll(None if patience is None else math.ceil(patience * 1000))
        return ([fd for fd, events in found if events & ~select.POLLOUT],
                [fd for fd, events in found if events & ~select.POLLIN])

    def _patience(self):
        while self.timers and self.timers[0].callback is None:
            heapq.heappop(self.timers)
        if self.calls:
            return 0
        return max(0, self.timers[0].when - time.monotonic()) if self.timers else None

    def _due(self):
        now = time.monotonic()
        while self.timers and self.timers[0].when <= now:
            callback = heapq.heappop(self.timers).callback
            if callback:
                callback()

    def close(self):
        """Gives back signals and descriptors; in a forked child it touches nothing the parent still uses."""
        for number in list(self.signals):
            self.on_signal(number, None)
        try:
            signal.set_wakeup_fd(-1)
        except ValueError:
            pass        # not the main thread
        os.close(self.wake_in)
        os.close(self.wake_out)
        self.wake_out = -1      # a helper thread may still call soon()


# ---------------------------------------------------------------- log: what the tools that keep running say

NOTE_PAUSE = 10.0           # seconds between two notes on one topic: strangers must not fill a log
TOPICS_MAX = 1000           # topics remembered; an address may be part of one, and strangers have many


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
    """Lines on standard error with time and tool, which never block and never flood.

    Lines beyond BURST and PER_SECOND are dropped and counted, and so is what would have to wait for a slow reader.
    note() is for what strangers can cause: of each topic the first at once, then one in NOTE_PAUSE with their number.
    """
    BURST, PER_SECOND = 200, 50

    def __init__(self, tool, clock=time.monotonic):
        self.tool = tool
        self.clock = clock
        self.bucket = TokenBucket(self.PER_SECOND, self.BURST)
        self.dropped = 0        # lines since the last one that was written
        self.topics = {}        # {topic: (when it was noted, how many have not been since)}, the oldest first
        self.lost = 0           # datagrams, as told to datagrams_lost()

    def __call__(self, text, always=False):
        if not (self.bucket.take(self.clock()) or always) or not has_room():
            self.dropped += 1
            return
        if self.dropped:
            text, self.dropped = "%s (%d lines before this one were dropped)" % (text, self.dropped), 0
        say("%s %s" % (time.strftime("%Y-%m-%dT%H:%M:%S"), self.tool), text[:2000])

    def note(self, topic, text):
        now = self.clock()
        when, held = self.topics.get(topic, (-NOTE_PAUSE, 0))
        if now - when < NOTE_PAUSE:
            self.topics[topic] = when, held + 1
            return
        self.topics.pop(topic, None)
        self.topics[topic] = now, 0
        if len(self.topics) > TOPICS_MAX:
            del self.topics[next(iter(self.topics))]
        self(text + (" (and %d more such since the last note)" % held if held else ""))

    def datagrams_lost(self, count):
        """Notes what the system has thrown away, `count` so far, of what should have been heard."""
        if count != self.lost:
            self.note("lost", "%d datagrams lost, this machine is too busy" % (count - self.lost))
            self.lost = count


# ---------------------------------------------------------------- group sockets

# Numbers that Python's socket module lacks in some or all versions.
SIOCGIFFLAGS, SIOCGIFADDR, SIOCGIFBRDADDR = 0x8913, 0x8915, 0x8919     # Linux
IFF_UP, IFF_LOOPBACK = 0x1, 0x8
IP_PKTINFO = 8 if LINUX else 26
IP_BOUND_IF, IPV6_BOUND_IF = 25, 125                # macOS
IP_MULTICAST_ALL, IPV6_MULTICAST_ALL = 49, 29       # Linux
IPV6_RECVPKTINFO, IPV6_PKTINFO = getattr(socket, "IPV6_RECVPKTINFO", 61), getattr(socket, "IPV6_PKTINFO", 46)   # macOS
SO_RXQ_OVFL, SO_ATTACH_FILTER = 40, 26              # Linux
LOAD_WORD, LOAD_OCTET, JUMP_EQUAL, RETURN = 0x20, 0x30, 0x15, 0x06      # Linux's socket filters
TENTATIVE, DUPLICATE = 0x40, 0x08                   # flags of an IPv6 address that cannot be used
TRUNCATED = int(socket.MSG_TRUNC)                   # the enumeration's own arithmetic is slow

PKTINFO = struct.Struct("@i4s4s")       # interface, source address, -
PKTINFO6 = struct.Struct("@16sI")       # source address, interface
HOPS = 31                   # multicast: across a campus, not across the world
RECEIVE_BUFFER = 1 << 20    # bytes the kernel may keep for us, if its own limit lets it: a burst of 1,000 datagrams
REJECTS_MAX = 64            # unwanted datagrams passed over in one call: a flood of them must not hold the loop
REFRESH_EVERY = 10.0        # seconds between two looks at the interfaces
REFRESH_PAUSE = 1.0         # seconds between two looks at the interfaces that failed sends ask for
BACKLOG = 512               # connections the kernel keeps while we are busy: a cold cluster's first answers


class Interface(collections.namedtuple("Interface", "name index flags addresses broadcast")):
    """One network interface.  addresses are those of the family asked for, None where the platform does not tell."""
    __slots__ = ()

    @property
    def loopback(self):
        return bool(self.flags & IFF_LOOPBACK) or self.name in LOOPBACK_NAMES

    @property
    def usable(self):
        return bool(self.flags & IFF_UP) and self.addresses != []


def local_interfaces(family):
    """Every Interface of this machine, up or not.

    Only the first IPv4 address of each is known, which is the one that its broadcasts carry.  Outside Linux just
    names and numbers are known, and every interface counts as up.
    """
    names = socket.if_nameindex()
    if not LINUX:
        return [Interface(name, index, IFF_UP, None, "") for index, name in names]
    found, inet6 = [], inet6_addresses() if family == socket.AF_INET6 else None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for index, name in names:
            flags = interface_field(probe, SIOCGIFFLAGS, name)
            address = interface_field(probe, SIOCGIFADDR, name) if inet6 is None else None
            addresses = [socket.inet_ntoa(address[4:8])] if address else []
            broadcast = address and interface_field(probe, SIOCGIFBRDADDR, name)
            found.append(Interface(name, index, struct.unpack_from("@H", flags or bytes(2))[0],
                                   addresses if inet6 is None else inet6.get(index, []),
                                   socket.inet_ntoa(broadcast[4:8]) if broadcast else ""))
    return found


def interface_field(probe, request, name):
    """What the kernel answers about one interface, after its name; None where it has no such thing, or is gone."""
    try:
        return fcntl.ioctl(probe.fileno(), request, struct.pack("16s24x", os.fsencode(name)))[16:]
    except OSError:
        return None


def inet6_addresses():
    """{interface index: [IPv6 addresses]} of the addresses that can be used now."""
    found = {}
    try:
        with open("/proc/net/if_inet6") as table:
            rows = [line.split() for line in table]
    except OSError:
        return found        # a kernel without IPv6
    for address, index, _, _, flags, _ in rows:
        if not int(flags, 16) & (TENTATIVE | DUPLICATE):
            found.setdefault(int(index, 16), []).append(socket.inet_ntop(socket.AF_INET6, bytes.fromhex(address)))
    return found


def device_index(name):
    """The number of the interface with this name.  Failure names those there are."""
    try:
        return socket.if_nametoindex(name)
    except OSError:
        known = " ".join(known for _, known in socket.if_nameindex())
        raise Failure(name, "no such device, this machine has: " + known) from None


def socket_address(family, address, port, device=""):
    """What bind, connect and sendto want; an IPv6 address of one link carries that link's number."""
    if family == socket.AF_INET:
        return address, port
    return address, port, 0, device_index(device) if device else 0


class GroupSocket:
    """A UDP socket for one group.

    As a listener it hears the group beside every other listener on this host, and what is sent to this host alone;
    of several listeners only one hears that.  A group on the loopback network hears nothing from elsewhere.
    Sending to a broadcast or multicast group goes out of every interface that is up, each time from an address of
    that interface, so that whoever hears it can connect back; out of loopback only where there is nothing else.
    Outside Linux and macOS a broadcast leaves by the interface that the system chooses.

    source   local address to send from, as parse_address gives it, for a host that stands in several networks
    home     the interface that was named, or that has the source address; None if there is none
    tried    names of the interfaces that the last send used, "" for the system's own choice
    dropped  datagrams that the kernel threw away because nobody fetched them, or because of pass_only
    """

    def __init__(self, group, listen, source=None):
        self.group, self.listen, self.source = group, listen, source
        self.tried, self.dropped, self.joined, self.targets, self.home = [], 0, set(), [], None
        self.index, self.loopback_indexes, self.refreshed = 0, set(), 0.0
        self.socket = socket.socket(group.family, socket.SOCK_DGRAM)
        try:
            self._options()
            self._bind()
            self._read_interfaces()
            if group.kind == "multicast" and listen:
                problems = self._join()
                if not self.joined:
                    raise Failure("cannot join %s" % group, ", ".join(problems) or "no interface is up")
        except BaseException:
            self.close()
            raise

    # -- making
    def _options(self):
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        if self.group.family == socket.AF_INET6:
            self._options6()
        else:
            self._options4()
        if self.listen:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if LINUX:
                self.socket.setsockopt(socket.SOL_SOCKET, SO_RXQ_OVFL, 1)
            elif hasattr(socket, "SO_REUSEPORT"):
                # The BSDs share a port among listeners only so; on Linux it would share out what must reach all.
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)

    def _options4(self):
        ip = socket.IPPROTO_IP
        self.socket.setsockopt(ip, socket.IP_MULTICAST_TTL, HOPS)
        self.socket.setsockopt(ip, socket.IP_MULTICAST_LOOP, 1)
        if LINUX:
            self.socket.setsockopt(ip, IP_MULTICAST_ALL, 0)     # else it hears what others on this host have joined
        if LINUX or MACOS:
            self.socket.setsockopt(ip, IP_PKTINFO, 1)
        elif self.group.only and self.listen:
            raise Failure(str(self.group), "this system does not tell which device a datagram came in by")

    def _options6(self):
        ip = socket.IPPROTO_IPV6
        self.socket.setsockopt(ip, socket.IPV6_V6ONLY, 1)       # a listener for IPv4 may share the port
        self.socket.setsockopt(ip, socket.IPV6_MULTICAST_HOPS, HOPS)
        self.socket.setsockopt(ip, socket.IPV6_MULTICAST_LOOP, 1)
        self.socket.setsockopt(ip, IPV6_RECVPKTINFO, 1)
        if LINUX:
            try:
                self.socket.setsockopt(ip, IPV6_MULTICAST_ALL, 0)
            except OSError:
                pass        # before Linux 4.20

    def _bind(self):
        group = self.group
        if self.listen:
            here = group.address if group.loopback and group.kind == "unicast" else ""
            place, what = socket_address(group.family, here, group.port), "cannot listen on UDP port %d" % group.port
        elif self.source:
            address, family, scope = self.source
            place, what = socket_address(family, address, 0, scope), "cannot send from %s" % address
        else:
            return
        try:
            self.socket.bind(place)
        except OSError as error:
            raise Failure(what, reason_of(error)) from None

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
        if group.kind == "unicast" and not group.only and not self.source:
            self.targets = [None]
            return
        found = local_interfaces(group.family)
        self.loopback_indexes = {interface.index for interface in found if interface.loopback}
        self.targets = self._choose(found)

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
        if not LINUX and not MACOS and group.kind != "multicast":
            return [None]
        return outer or [interface for interface in usable if interface.loopback]

    def _join(self):
        """Joins the group on every interface in use that it is not yet joined on.  Returns the problems."""
        wanted = {interface.index: interface.name for interface in self.targets if interface}
        for index in self.joined - set(wanted):
            self._membership(index, join=False)
            self.joined.discard(index)
        problems = []
        for index in set(wanted) - self.joined:
            problem = self._membership(index, join=True)
            if problem:
                problems.append("%s: %s" % (wanted[index], problem))
            else:
                self.joined.add(index)
        return problems

    def _membership(self, index, join):
        packed = socket.inet_pton(self.group.family, self.group.address)
        if self.group.family == socket.AF_INET6:
            what = (socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP if join else socket.IPV6_LEAVE_GROUP)
            request = struct.pack("@16sI", packed, index)
        else:
            what = (socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP if join else socket.IP_DROP_MEMBERSHIP)
            request = struct.pack("@4s4si", packed, bytes(4), index)
        try:
            self.socket.setsockopt(*what, request)
        except OSError as error:
            return None if error.errno == errno.EADDRINUSE else reason_of(error)
        return None

    # -- sending
    def send(self, data):
        """Sends one datagram to the group out of every interface in use.  Returns the problems, one text for each
        interface that failed; it reached nobody when there are as many as were tried."""
        self.tried, problems = [interface.name if interface else "" for interface in self.targets], []
        for interface in self.targets:
            try:
                self._send(data, interface)
            except OSError as error:
                problems.append("%s%s" % (interface.name + ": " if interface else "", reason_of(error)))
        if not self.targets:
            problems.append("no interface is up")
        if problems and time.monotonic() - self.refreshed > REFRESH_PAUSE:
            self.refresh()
        return problems

    def _send(self, data, interface):
        group, index = self.group, interface.index if interface else 0
        if group.family == socket.AF_INET6:
            place = (group.address, group.port, 0, index)
            note = (socket.IPPROTO_IPV6, IPV6_PKTINFO, PKTINFO6.pack(bytes(16), index))
        else:
            place = (group.address, group.port)
            source = bytes(4) if self.source or not interface or not interface.addresses else \
                socket.inet_aton(interface.addresses[0])
            note = (socket.IPPROTO_IP, IP_PKTINFO, PKTINFO.pack(index, source, bytes(4)))
        if interface and not LINUX:
            note = self._steer(index)
        self.socket.sendmsg([data], [note] if interface and note else [], 0, place)

    def _steer(self, index):
        """Names the interface for the next datagram where no note beside the datagram can."""
        six, four = self.group.family == socket.AF_INET6, struct.pack("@4s4si", bytes(4), bytes(4), index)
        if MACOS:
            self.socket.setsockopt(socket.IPPROTO_IPV6 if six else socket.IPPROTO_IP,
                                   IPV6_BOUND_IF if six else IP_BOUND_IF, index)
        elif six:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, index)
        else:
            self.socket.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, four)

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
            index = self._note(notes)
            # This host's own datagrams to one of its own addresses pass through loopback, whatever the device.
            here = not self.group.only or index == self.index or index in self.loopback_indexes
            if here and not flags & TRUNCATED:
                return data, source, index
        return None

    def _note(self, notes):
        """The interface number in what came beside a datagram; keeps the count of the dropped."""
        index = 0
        for level, kind, value in notes:
            if level == socket.IPPROTO_IP and kind == IP_PKTINFO:
                index = PKTINFO.unpack_from(value)[0]
            elif level == socket.IPPROTO_IPV6 and kind == IPV6_PKTINFO:
                index = PKTINFO6.unpack_from(value)[1]
            elif level == socket.SOL_SOCKET and kind == SO_RXQ_OVFL:
                self.dropped = struct.unpack("@I", value)[0]
        return index

    def pass_only(self, key_id, kinds):
        """From now on the kernel passes, if it can, only datagrams of this key and these kinds, and those of other
        protocol versions: the rest wakes nobody."""
        if not LINUX:
            return
        import array
        program = array.array("B", datagram_filter(key_id, kinds))
        try:
            self.socket.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER,
                                   struct.pack("@HP", len(program) // 8, program.buffer_info()[0]))
        except OSError:
            pass        # forbidden, or no memory for it: whoever listens passes over the rest by himself

    def fileno(self):
        return self.socket.fileno()

    def close(self):
        self.socket.close()


def datagram_filter(key_id, kinds):
    """The bytes of a socket filter for pass_only (classic BPF, see the kernel's networking/filter).  Loads count from
    the UDP header, 8 bytes before the datagram; one beyond the end rejects it."""
    conditions = len(kinds)
    reject, accept = 7 + conditions, 8 + conditions     # positions; a jump counts from the instruction behind it
    program = [(LOAD_WORD, 0, 0, 8), (JUMP_EQUAL, 0, reject - 2, int.from_bytes(MAGIC, "big")),
               (LOAD_OCTET, 0, 0, 12), (JUMP_EQUAL, 0, accept - 4, WIRE_VERSION),
               (LOAD_WORD, 0, 0, 16), (JUMP_EQUAL, 0, reject - 6, int.from_bytes(key_id, "big")),
               (LOAD_OCTET, 0, 0, 13)]
    program += [(JUMP_EQUAL, accept - 8 - place, 0, kind) for place, kind in enumerate(kinds)]
    program += [(RETURN, 0, 0, 0), (RETURN, 0, 0, 1 << 16)]
    return b"".join(struct.pack("@HBBI", *instruction) for instruction in program)


# ---------------------------------------------------------------- TCP listeners

def open_listener(group, ports=None):
    """A listening TCP socket for those who answer on this group: on loopback alone if the group is there.

    ports   [(low, high), ...] to take the first free one from; None for any
    """
    address = ("::1" if group.family == socket.AF_INET6 else "127.0.0.1") if group.loopback else ""
    return listen_at(socket_address(group.family, address, 0), group.family, ports)


def listen_at(place, family, ports=None, backlog=BACKLOG):
    """A non-blocking listening TCP socket at this address, on the first free one of the ports."""
    for port in (port for low, high in ports or [(0, 0)] for port in range(low, high + 1)):
        try:
            return listen_on((place[0], port, *place[2:]), family, backlog)
        except OSError as error:
            why = error
            if error.errno != errno.EADDRINUSE:
                break
    raise Failure("cannot listen on TCP port " + ports_text(ports) if ports else "cannot listen", reason_of(why))


def listen_on(place, family, backlog):
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setblocking(False)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if place[1]:
            # A port that the user named is ours again at once after an earlier run.
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(place)
        made.listen(backlog)
    except BaseException:
        made.close()
        raise
    return made


def ports_text(ports):
    """The ranges as the user would write them."""
    return ",".join(str(low) if low == high else "%d-%d" % (low, high) for low, high in ports)


# ---------------------------------------------------------------- descriptors
#
# Sources are read from, sinks written to.  Inherited descriptors belong to others as well: their O_NONBLOCK is
# never touched, so each kind has its own way not to block the loop.

REGULAR, PIPE, SOCKET, TERMINAL, DEVICE = "regular", "pipe", "socket", "terminal", "device"
RWF_NOWAIT = getattr(os, "RWF_NOWAIT", None) if LINUX else None
O_PATH = getattr(os, "O_PATH", 0)
UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS, errno.ESPIPE)
F_DUPFD_QUERY = 1027        # Linux 6.10: are these two the same open file?


def stream_kind(fd):
    """What an open descriptor is, or None for what carries no stream (directories, datagram sockets, event queues)."""
    mode = os.fstat(fd).st_mode
    if O_PATH and fcntl.fcntl(fd, fcntl.F_GETFL) & O_PATH == O_PATH:
        return None
    if stat.S_ISREG(mode) or stat.S_ISBLK(mode):
        return REGULAR
    if stat.S_ISFIFO(mode):
        return PIPE
    if stat.S_ISSOCK(mode):
        return SOCKET if is_stream(fd) else None
    if stat.S_ISCHR(mode):
        return TERMINAL if os.isatty(fd) else DEVICE
    return None


def is_stream(fd):
    """Whether a socket is a stream that is not listening."""
    with socket.socket(fileno=os.dup(fd)) as probe:
        try:
            return (probe.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE) == socket.SOCK_STREAM
                    and not probe.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
        except OSError:
            return False


def access_of(fd):
    """IN, OUT or BOTH, as the descriptor was opened; None for one that is good for ioctl only."""
    mode = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
    return {os.O_RDONLY: IN, os.O_WRONLY: OUT, os.O_RDWR: BOTH}.get(mode)


def open_descriptors(highest):
    """The numbers of the open descriptors from 0 to highest."""
    found = []
    for fd in range(highest + 1):
        try:
            fcntl.fcntl(fd, fcntl.F_GETFD)
            found.append(fd)
        except OSError:
            pass
    return found


def carried_descriptors(highest):
    """{number: IN, OUT, BOTH or the lower number it shares} of what this process inherited.

    Two numbers of one pipe, socket or open file stay one in the job, so `2>&1` keeps the order of what is written.
    A terminal is read through its lowest number only; its other numbers are for writing.
    """
    result, terminals = {}, set()
    for fd in open_descriptors(highest):
        kind = stream_kind(fd)
        if kind is None:
            continue
        access = access_of(fd)
        if access is None:
            continue
        if kind is TERMINAL:
            access = _terminal_access(fd, access, terminals)
        same = [other for other, known in result.items() if known == access and _same_open_file(fd, other, kind)]
        result[fd] = same[0] if same else access
    return result


def _terminal_access(fd, access, terminals):
    device = os.fstat(fd).st_rdev
    if access is OUT or (access is BOTH and (fd in (1, 2) or device in terminals)):
        return OUT
    terminals.add(device)
    return IN


def _same_open_file(one, two, kind):
    """Whether two descriptors that were opened alike share one place in one file, or one pipe, socket or terminal."""
    a, b = os.fstat(one), os.fstat(two)
    if (a.st_dev, a.st_ino, a.st_rdev) != (b.st_dev, b.st_ino, b.st_rdev):
        return False
    if kind is not REGULAR:
        return True
    offset, flags = os.lseek(one, 0, os.SEEK_CUR), fcntl.fcntl(one, fcntl.F_GETFL)
    if offset != os.lseek(two, 0, os.SEEK_CUR) or flags != fcntl.fcntl(two, fcntl.F_GETFL):
        return False
    if access_of(one) is not IN:
        return True         # to write one file at one place by two openings makes no sense, so it is one
    try:
        return fcntl.fcntl(one, F_DUPFD_QUERY, two) == 1
    except OSError:
        return _shares_offset(one, two, offset)


def _shares_offset(one, two, offset):
    """Moves the one and looks at the other: for kernels that do not answer the question."""
    try:
        return os.lseek(one, offset + 1, os.SEEK_SET) == os.lseek(two, 0, os.SEEK_CUR)
    finally:
        os.lseek(one, offset, os.SEEK_SET)


def park(fd):
    """Closes a descriptor but keeps its number occupied, so that nothing of ours ever gets to stand there."""
    null = os.open(os.devnull, os.O_RDWR)
    if null != fd:
        os.dup2(null, fd)
        os.close(null)


def is_memory(fd):
    """Whether a device is /dev/null or one of its kin, which never block (Linux gives them the major number 1)."""
    return LINUX and os.major(os.fstat(fd).st_rdev) == 1


F_SETPIPE_SZ, F_GETPIPE_SZ = 1031, 1032     # Linux; Python has the names from 3.10 on
PIPE_SIZE = 1 << 20         # a buffer at a time goes through, where the default takes a quarter of one


def enlarge_pipe(fd):
    """Makes a pipe hold more, for everybody who has it; its contents and flags stay as they are."""
    try:
        if LINUX and fcntl.fcntl(fd, F_GETPIPE_SZ) < PIPE_SIZE:
            fcntl.fcntl(fd, F_SETPIPE_SZ, PIPE_SIZE)
    except OSError:
        pass        # the user's share of pipe memory is used up: smaller pipes are only slower


class Source:
    """Something to read.  read_into(view) returns bytes read, 0 at the end, or None when there is nothing now and
    `ready` will be called once there is."""

    def __init__(self, loop, fd, ready):
        self.loop, self.fd, self.ready, self.closed = loop, fd, ready, False

    def read_into(self, view):
        try:
            return self._read(view)
        except (BlockingIOError, InterruptedError):
            self.loop.watch(self.fd, read=self._readable)
            return None

    def _read(self, view):
        return os.readv(self.fd, [view])

    def _readable(self):
        self.loop.watch(self.fd)
        if not self.closed:
            self.ready()

    def close(self):
        if not self.closed:
            self.closed = True
            self.loop.watch(self.fd)


class SocketSource(Source):
    """A socket that others may share.  Its sink watches the same descriptor, so both go through one duplicate each."""

    def __init__(self, loop, fd, ready):
        self.socket = socket.socket(fileno=os.dup(fd))
        super().__init__(loop, self.socket.fileno(), ready)

    def _read(self, view):
        try:
            return self.socket.recv_into(view, 0, socket.MSG_DONTWAIT)
        except ConnectionResetError:
            if self.socket.family in (socket.AF_INET, socket.AF_INET6):
                raise           # the input may have been cut short
            return 0            # a job that ended with input unread resets its socket pair

    def close(self):
        super().close()
        self.socket.close()


def wait_for(fd, event):
    """Waits in a helper thread for a descriptor of any number."""
    poll = select.poll()
    poll.register(fd, event)
    poll.poll()


class ThreadSource(Source):
    """A terminal or device: one read at a time in a helper thread, and only when somebody wants it."""
    CHUNK = 1 << 16

    def __init__(self, loop, fd, ready):
        super().__init__(loop, fd, ready)
        self.result, self.wanted = None, None

    def read_into(self, view):
        if self.wanted is None:
            import threading
            self.wanted = threading.Semaphore(0)
            threading.Thread(target=self._run, daemon=True).start()
            self.wanted.release()
        if self.result is None:
            return None
        if isinstance(self.result, OSError):
            raise self.result
        size = min(len(view), len(self.result))
        view[:size] = self.result[:size]
        if size < len(self.result):
            self.result = self.result[size:]
        elif size:
            self.result = None
            self.wanted.release()
        return size

    def _run(self):
        while not self.closed:
            self.wanted.acquire()
            if self.closed:
                return
            self.loop.call_soon_threadsafe(lambda result=self._fetch(): self._arrived(result))

    def _fetch(self):
        while True:
            try:
                return os.read(self.fd, self.CHUNK)
            except BlockingIOError:     # somebody else set O_NONBLOCK on it
                wait_for(self.fd, select.POLLIN)
            except OSError as error:
                return error

    def _arrived(self, result):
        self.result = result
        if not self.closed:
            self.ready()

    def close(self):
        self.closed = True
        if self.wanted:
            self.wanted.release()


class PipeSource(Source):
    """A pipe that others may read too: ready one moment and empty the next, so RWF_NOWAIT (Linux).

    A FIFO opened by its name, and other systems, do not have that: a thread reads for them.
    """

    def __init__(self, loop, fd, ready):
        super().__init__(loop, fd, ready)
        self.thread = None if RWF_NOWAIT else ThreadSource(loop, fd, ready)

    def read_into(self, view):
        if not self.thread:
            try:
                return super().read_into(view)
            except OSError as error:
                if error.errno not in UNSUPPORTED:
                    raise
                self.thread = ThreadSource(self.loop, self.fd, self.ready)
        return self.thread.read_into(view)

    def _read(self, view):
        return os.preadv(self.fd, [view], -1, RWF_NOWAIT)

    def close(self):
        super().close()
        if self.thread:
            self.thread.close()


def open_source(loop, fd, ready):
    kind = stream_kind(fd)
    if kind is REGULAR or (kind is DEVICE and is_memory(fd)):
        return Source(loop, fd, ready)
    if kind is SOCKET:
        return SocketSource(loop, fd, ready)
    if kind is PIPE:
        enlarge_pipe(fd)
    return (PipeSource if kind is PIPE else ThreadSource)(loop, fd, ready)


class Sink:
    """Something to write to.  feed(view) takes data (the view only until it returns, unless it is large);
    consumed(n) is called when bytes have left this process, failed(error) once when nobody takes any more.
    finish() ends it behind what is still queued, then calls finished()."""
    KEEP = 1 << 16          # a view at least this long is kept, a shorter one copied: it would pin a whole buffer

    def __init__(self, loop, fd, consumed, failed, finished):
        self.loop, self.fd = loop, fd
        self.consumed, self.failed, self.finished = consumed, failed, finished
        self.queue, self.ending, self.done = collections.deque(), False, False

    def feed(self, view):
        """Returns whether the view was kept: then its buffer must not be used again."""
        if self.done:
            self.consumed(len(view))
            return False
        sent = 0 if self.queue else self._try(view)
        if sent:
            self.consumed(sent)
        rest = view[sent:]
        if not len(rest) or self.done:
            return False
        return self._enqueue(rest)

    def _enqueue(self, rest):
        kept = len(rest) >= self.KEEP
        self.queue.append(rest if kept else bytes(rest))
        self.loop.watch(self.fd, write=self._writable)
        return kept

    def _try(self, view):
        try:
            return self._write(view)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            self._fail(error)
            return 0

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
        """Nothing is queued: end, or wait for the day that the other side goes."""
        if self.done:
            return
        if self.ending:
            self.close()
            self.finished()
        else:
            self.watch_other_side()

    def watch_other_side(self):
        """A pipe's writing end becomes readable, on Linux, when its last reader has gone."""
        self.loop.watch(self.fd, read=self._reader_gone if self._tells_of_readers() else None)

    def _tells_of_readers(self):
        return LINUX and stream_kind(self.fd) is PIPE and access_of(self.fd) is OUT

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


class FileSink(Sink):
    """A regular file: it never says that it would block, so all is written at once."""

    def _try(self, view):
        sent = 0
        try:
            while sent < len(view):
                sent += os.write(self.fd, view[sent:])
        except OSError as error:
            self._fail(error)
        return sent

    def watch_other_side(self):
        pass


class SocketSink(Sink):
    def __init__(self, loop, fd, *calls):
        self.socket = socket.socket(fileno=os.dup(fd))
        super().__init__(loop, self.socket.fileno(), *calls)

    def _write(self, view):
        return self.socket.send(view, socket.MSG_DONTWAIT)

    def watch_other_side(self):
        self.loop.watch(self.fd)

    def close(self):
        super().close()
        self.socket.close()


class ThreadSink(Sink):
    """A pipe or terminal that others may share: a helper thread writes and may block as long as it likes."""
    CHUNK = 1 << 18

    def __init__(self, loop, fd, *calls):
        super().__init__(loop, fd, *calls)
        self.work, self.deaf = None, False
        self.watch_other_side()

    def _write(self, view):
        """A thread is only for what the system, asked not to wait, does not take at once."""
        if RWF_NOWAIT is None or self.deaf:
            return 0
        try:
            return os.pwritev(self.fd, [view], -1, RWF_NOWAIT)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            self.deaf = True
            return 0

    def _enqueue(self, rest):
        kept = len(rest) >= self.KEEP
        self.queue.append(rest if kept else bytes(rest))
        if len(self.queue) == 1:
            self.loop.watch(self.fd)
            self._hand_over()
        return kept

    def _hand_over(self):
        if self.work is None:
            import threading
            self.work = collections.deque(), threading.Semaphore(0)
            threading.Thread(target=self._run, args=self.work, daemon=True).start()
        self.work[0].append(self.queue[0])
        self.work[1].release()

    def _run(self, items, counter):
        while True:
            counter.acquire()
            view = items.popleft()
            if view is None:
                return
            self.loop.call_soon_threadsafe(lambda error=self._write_all(view): self._written(error))

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

    def _written(self, error):
        if self.done:
            return
        if error:
            self._fail(error)
            return
        size = len(self.queue.popleft())
        if self.queue:
            self._hand_over()
        self.consumed(size)
        if not self.queue:
            self._rest()

    def close(self):
        super().close()
        if self.work:
            self.work[0].append(None)
            self.work[1].release()
            self.work = None


def open_sink(loop, fd, *calls):
    kind = stream_kind(fd)
    if kind is REGULAR or (kind is DEVICE and is_memory(fd)):
        return FileSink(loop, fd, *calls)
    if kind is SOCKET:
        return SocketSink(loop, fd, *calls)
    if kind is PIPE:
        enlarge_pipe(fd)
    return ThreadSink(loop, fd, *calls)


# ---------------------------------------------------------------- carrier

class Channel:
    """Moves bytes between one TLS connection, its session and the local descriptors, in both directions.

    on_event(type, number, body) hears what the session does not settle by itself; on_lost(words) is called once when
    the connection ends before the session is over.
    """
    ROUNDS = 8              # buffers per call, so that a fast peer does not starve timers and signals
    TICK = 0.25             # the silence clock looks at least so often, seconds, and at a quarter of the timeout

    def __init__(self, loop, connection, session, on_event, on_lost):
        self.loop, self.connection, self.session = loop, connection, session
        self.on_event, self.on_lost = on_event, on_lost
        self.fd = connection.fileno()
        self.incoming = memoryview(bytearray(BUFFER))
        self.outgoing = bytearray(BUFFER)
        self.pending = memoryview(b"")
        self.sources, self.ready, self.sinks = {}, collections.deque(), {}
        self.on_flushed, self.closed, self.filling, self.blocked, self.processing = None, False, False, False, False
        self.sent_total = self.received_total = 0
        self.timer = loop.call_later(0, self.tick)       # nothing is sent before the owner has what the events may need
        connection.setblocking(False)
        loop.watch(self.fd, read=self.readable)
        loop.call_soon_threadsafe(self.readable)        # the handshake may have decrypted more than its own

    # -- descriptors
    def add_source(self, number, source):
        """The caller flushes when all are there."""
        self.sources[number] = source
        self.ready.append(number)

    def source_ready(self, number):
        if number in self.sources and number not in self.ready:
            self.ready.append(number)
        self.flush()

    def drop_source(self, number):
        source = self.sources.pop(number, None)
        if source:
            source.close()

    def consumed(self, number, size):
        self.session.consumed(number, size, time.monotonic())
        if self.session.outbox and not self.processing:
            self.flush()

    # -- to the peer
    def flush(self):
        """Sends what there is to send, as far as the connection takes it now."""
        if self.closed or self.filling or self.blocked:
            return
        try:
            for _ in range(self.ROUNDS):
                if not self.pending and not self._fill():
                    self._flushed()
                    return
                self._send()
        except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
            pass
        except (OSError, ValueError):
            self.blocked = True         # nothing goes out any more; what came in before the end is still heard
            self.loop.call_soon_threadsafe(self.readable)
            return
        self.blocked = True
        self.loop.watch(self.fd, read=self.readable, write=self._writable)

    def _writable(self):
        self.blocked = False
        self.loop.watch(self.fd, read=self.readable)
        self.flush()

    def _send(self):
        several = len(self.pending) > RECORD
        if several:
            self._cork(1)
        try:
            while self.pending:
                self.pending = self.pending[self.connection.send(self.pending):]
        finally:
            if several:
                self._cork(0)

    def _cork(self, on):
        """Several records leave in large packets where the system can be told to wait for more."""
        try:
            if LINUX:
                self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, on)
        except OSError:
            pass        # a system that is Linux in name only

    def _flushed(self):
        if self.on_flushed and not self.session.outbox:
            callback, self.on_flushed = self.on_flushed, None
            callback()

    def _fill(self):
        """Gathers messages into the buffer: control first, then data of the descriptors in turn."""
        session, at = self.session, 0
        self.filling = True         # a source's end must not start a second filling inside this one
        try:
            at = self._take_control(0)
            for _ in range(len(self.ready)):
                if BUFFER - at < 4096:
                    break
                at = self._take_data(self.ready.popleft(), at)
            if session.outbox and at < BUFFER:
                at = self._take_control(at)     # ends that the sources came to
        finally:
            self.filling = False
        self.pending = memoryview(self.outgoing)[:at]
        return at

    def _take_control(self, at):
        part = self.session.outbox[:BUFFER - at]
        self.outgoing[at:at + len(part)] = part
        del self.session.outbox[:len(part)]
        return at + len(part)

    def _take_data(self, number, at):
        """One read of one source behind its header's place.  Without credit it stays ready, and waits."""
        source, start = self.sources.get(number), at + HEAD_SIZE
        if source is None:
            return at
        room = min(self.session.may_send(number), BUFFER - start)
        if room > RECORD:       # whole records: a short one at the end costs as much as a full one
            room -= (start + room) % RECORD
        if room <= 0:
            self.ready.append(number)
            return at
        try:
            size = source.read_into(memoryview(self.outgoing)[start:start + room])
        except OSError as error:
            size = self.on_read_error(number, error)
        if size is None:
            return at
        if size == 0:
            self._source_ended(number)
            return at
        self.session.data(self.outgoing, at, number, size)
        self.sent_total += size
        self.ready.append(number)
        return start + size

    def on_read_error(self, number, error):
        """What a source that cannot be read any more is taken for: its end."""
        return 0

    def _source_ended(self, number):
        self.drop_source(number)
        self.session.end(number)

    # -- from the peer
    def readable(self):
        if self.closed:
            return
        for _ in range(self.ROUNDS // 2):
            filled, verdict = self._receive()
            self.processing = True      # what it gives back goes out together, at the end
            try:
                if filled and not self._process(filled):
                    return
            finally:
                self.processing = False
            if verdict is not None:
                if verdict:
                    self.lost(verdict)
                break
        else:
            self.loop.call_soon_threadsafe(self.readable)       # what TLS holds decrypted wakes no select
        if not self.closed:
            self.flush()

    def _receive(self):
        """(bytes read, None for more to come, "" for nothing more now, or the words of a lost connection)."""
        filled = 0
        try:
            while filled < BUFFER:
                size = self.connection.recv_into(self.incoming[filled:])
                if not size:
                    return filled, "the connection was closed"
                filled += size
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return filled, ""
        except (OSError, ValueError) as error:
            return filled, connection_words(error)
        return filled, None

    def _process(self, filled):
        """Acts on one buffer of messages; returns whether the carrier is still open."""
        kept = False
        try:
            for kind, number, body in self.session.receive(self.incoming[:filled], time.monotonic()):
                if kind == DATA:
                    kept = self.deliver(number, body) or kept
                elif kind == CREDIT:
                    pass        # the source waits in `ready`; flush follows
                else:
                    self.on_event(kind, number, body)
                if self.closed:
                    return False
        except ProtocolError as error:
            self.lost("protocol broken: %s" % error)
            return False
        if kept:
            self.incoming = memoryview(bytearray(BUFFER))
        return True

    def deliver(self, number, body):
        self.received_total += len(body)
        return self.sinks[number].feed(body)

    # -- silence and the end
    def tick(self):
        """Looks at the silence clock, now and from now on."""
        if self.closed:
            return
        self.timer.cancel()
        now = time.monotonic()
        if self.session.tick(now):
            self.lost("silent for %g seconds" % self.session.timeout)
            return
        self.flush()
        self.timer = self.loop.call_at(now + max(self.TICK, min(15, self.session.timeout / 8)), self.tick)

    def lost(self, words):
        if not self.closed:
            over = self.session.phase is OVER
            self.close()
            if not over or words.startswith("protocol"):
                self.on_lost(words)

    def close(self):
        """Ends the connection at once; what is queued for local descriptors stays with its sinks."""
        if self.closed:
            return
        self.closed = True
        self.timer.cancel()
        self.loop.watch(self.fd)
        for number in list(self.sources):
            self.drop_source(number)
        try:
            self.connection.close()
        except OSError:
            pass


def connection_words(error):
    if ssl and isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError)):
        return "the connection was closed"
    if hasattr(error, "library"):       # an ssl.SSLError
        return "the channel broke: %s" % (error.reason or reason_of(error)).lower().replace("_", " ")
    return "the connection broke: %s" % reason_of(error)


# ---------------------------------------------------------------- children

KILL_GRACE = 2.0            # seconds a job's group has between TERM and KILL


def spawn(path, command, environment, ends, terminal=None):
    """Starts the job as the leader of a session of its own; returns its pid.

    ends: {descriptor in the job: descriptor here}; every other descriptor is closed.  terminal: a descriptor that
    becomes the controlling terminal.  OSError when the system refuses to run it.
    """
    if terminal is None and hasattr(os, "posix_spawn"):
        try:
            return _spawn_at_once(path, command, environment, ends)
        except NotImplementedError:
            pass        # a C library without setsid there
    return _spawn_by_fork(path, command, environment, ends, terminal)


def _spawn_at_once(path, command, environment, ends):
    """posix_spawn copies no page tables: 0.2 ms where fork takes 2.5.  It cannot set a controlling terminal."""
    above = max(list(ends) + [2]) + 1
    moved = {}
    try:
        for fd, end in ends.items():        # first out of the way of the numbers that the job wants
            moved[fd] = fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, above)
        actions = [(os.POSIX_SPAWN_DUP2, other, fd) for fd, other in moved.items()]
        actions += [(os.POSIX_SPAWN_CLOSE, fd) for fd in open_descriptors(2) if fd not in ends]
        return os.posix_spawn(path, command, environment, file_actions=actions, setsid=True, setsigmask=[],
                              setsigdef=set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP})
    finally:
        for other in moved.values():
            os.close(other)


def _spawn_by_fork(path, command, environment, ends, terminal):
    report_in, report_out = os.pipe()
    try:
        pid = os.fork()
    except OSError:
        os.close(report_in)
        os.close(report_out)
        raise
    if pid == 0:
        _become(path, command, environment, ends, terminal, report_out)
    os.close(report_out)
    with open(report_in, "rb", 0) as report:
        words = report.read(16)
    if words:
        os.waitpid(pid, 0)
        raise OSError(int(words), os.strerror(int(words)))
    return pid


def _become(path, command, environment, ends, terminal, report):
    """In the forked child: turns into the job, or reports errno and ends.  Nothing here may raise or return."""
    try:
        os.setsid()
        _default_signals()
        if terminal is not None:
            import termios
            fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
        report = _place(ends, report)
        os.execve(path, command, environment)
    except OSError as error:
        os.write(report, b"%d" % (error.errno or errno.EINVAL))
    except BaseException:
        os.write(report, b"%d" % errno.EINVAL)
    os._exit(127)


def _default_signals():
    for number in signal.Signals:
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            try:
                signal.signal(number, signal.SIG_DFL)
            except (OSError, ValueError):
                pass        # one that the C library keeps for itself
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def _place(ends, report):
    """Puts every end where the job wants it; returns the report pipe's number, moved out of the way."""
    above = max(list(ends) + [2]) + 1
    moved = {fd: fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, above) for fd, end in ends.items()}
    report = fcntl.fcntl(report, fcntl.F_DUPFD_CLOEXEC, above)
    for fd in range(above):
        if fd in moved:
            os.dup2(moved[fd], fd, inheritable=True)
        else:
            try:
                os.close(fd)        # the standard ones are inherited; the rest closes at exec anyhow
            except OSError:
                pass
    return report


def signal_group(group, number):
    """Sends a signal to every process of the group; returns whether there was any."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass        # some of them have changed their user; macOS says so for zombies too
    return True


def process_ids():
    """The pids, as text, of all processes that can be seen; none where there is no /proc as Linux has it."""
    try:
        return [name for name in os.listdir("/proc") if name.isdigit()] if LINUX else []
    except OSError:
        return []


def session_groups(leader):
    """The process groups of a session, those of zombies alone left out.  Where there is no /proc as Linux has it, the
    leader's own group."""
    pids = process_ids()
    if str(os.getpid()) not in pids:
        return {leader}
    groups = set()
    for pid in pids:
        try:
            with open("/proc/%s/stat" % pid, "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
            if int(fields[3]) == leader and fields[0] != b"Z":
                groups.add(int(fields[2]))
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                return {leader}     # there is no way to look; else it has ended meanwhile
        except (ValueError, IndexError):
            pass
    return groups


class GroupKill:
    """Ends a job's session, the whole of it or only its leader's group: TERM (and CONT, for the stopped), then KILL
    after a grace; then calls done(), once.  It must have found nobody twice: a look at /proc takes a while, and may
    miss who is just being born."""
    LOOK = 0.02

    def __init__(self, loop, leader, done, reap=lambda: None, whole=True):
        self.loop, self.leader, self.done, self.reap, self.whole = loop, leader, done, reap, whole
        self.deadline, self.killed, self.seen = time.monotonic() + KILL_GRACE, False, True
        self.send(signal.SIGTERM, signal.SIGHUP, signal.SIGCONT)
        loop.call_soon_threadsafe(self._look)

    def send(self, *numbers):
        """Sends the signals to every group; returns whether there was any process."""
        found = False
        groups = session_groups(self.leader)
        for group in groups if self.whole else groups & {self.leader}:
            for number in numbers:
                found = signal_group(group, number) or found
        return found

    def _look(self):
        self.reap()
        late = time.monotonic() - self.deadline
        before, self.seen = self.seen, self.send(0)
        if not (before or self.seen) or (self.killed and late > KILL_GRACE):
            self.done()
            return
        if late >= 0 and not self.killed:
            self.kill()
        self.loop.call_later(self.LOOK, self._look)

    def kill(self):
        self.killed = True
        self.send(signal.SIGKILL)


# ---------------------------------------------------------------- terminals

CONTROL_CHARACTERS = "INTR QUIT ERASE KILL EOF EOL EOL2 START STOP SUSP REPRINT WERASE LNEXT DISCARD".split()
MODE_FLAGS = {0: "IXON IXOFF IXANY ICRNL INLCR IGNCR ISTRIP IUTF8 IMAXBEL".split(),
              1: "OPOST ONLCR OCRNL ONLRET".split(),
              3: "ISIG ICANON ECHO ECHOE ECHOK ECHONL ECHOCTL ECHOKE IEXTEN NOFLSH TOSTOP".split()}


def terminal_modes(fd):
    """{name: number} of a terminal's control characters and flags: names, because every system numbers them its way."""
    import termios
    attributes, modes = termios.tcgetattr(fd), {}
    for name in CONTROL_CHARACTERS:
        place = getattr(termios, "V" + name, None)
        if place is not None:
            modes[b"V" + name.encode()] = ord(attributes[6][place])
    for field, names in MODE_FLAGS.items():
        for name in names:
            if hasattr(termios, name):
                modes[name.encode()] = int(bool(attributes[field] & getattr(termios, name)))
    return modes


def set_terminal(fd, rows, columns, modes):
    """Makes a terminal like the one that terminal_modes described; names that this system does not know are left."""
    import termios
    attributes = termios.tcgetattr(fd)
    for name in CONTROL_CHARACTERS:
        place = getattr(termios, "V" + name, None)
        if place is not None and b"V" + name.encode() in modes:
            attributes[6][place] = bytes([modes[b"V" + name.encode()]])
    for field, names in MODE_FLAGS.items():
        for name in names:
            bit, wanted = getattr(termios, name, 0), modes.get(name.encode())
            if wanted is not None:
                attributes[field] = attributes[field] | bit if wanted else attributes[field] & ~bit
    termios.tcsetattr(fd, termios.TCSANOW, attributes)
    set_window(fd, rows, columns)


def set_window(fd, rows, columns):
    """Tells a terminal its size; its foreground processes get WINCH."""
    import termios
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


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
        rows, columns = self.size()
        modes = terminal_modes(self.tty) if self.tty is not None else {}
        return rows, columns, os.environb.get(b"TERM", b"dumb")[:64], modes

    def size(self):
        try:
            columns, rows = os.get_terminal_size(self.tty)
        except (OSError, TypeError):
            return 24, 80
        return rows, columns

    def raw(self):
        """From here on every key goes to the job."""
        import termios
        import tty
        if self.tty is None or self.reading is None or not self.is_ours():
            return
        try:
            self.saved = self.saved or termios.tcgetattr(self.tty)
            tty.setraw(self.tty, termios.TCSADRAIN)
        except termios.error:
            pass        # it has been hung up; reading will tell

    def restore(self):
        """As it was, unless it is somebody else's by now."""
        import termios
        saved, self.saved = self.saved, None
        while saved is not None and self.is_ours():
            try:
                termios.tcsetattr(self.tty, termios.TCSADRAIN, saved)
                return
            except termios.error as error:
                if error.args[0] != errno.EINTR:
                    return

    def is_ours(self):
        """Whether this process is in the foreground; a terminal that controls nobody here has no background."""
        try:
            return self.tty is None or os.tcgetpgrp(self.tty) == os.getpgrp()
        except OSError as error:
            return error.errno == errno.ENOTTY


class EscapeSource:
    """A source: what the user types, less the commands to cexec, which go to on_command(name)."""

    def __init__(self, loop, fd, ready, character, on_command):
        self.live, self.escapes, self.on_command = open_source(loop, fd, ready), EscapeFilter(character), on_command
        self.buffer, self.touched = b"", False

    def read_into(self, view):
        while not self.buffer:
            part = bytearray(min(len(view), 4096))
            size = self.live.read_into(memoryview(part))
            if not size:
                return size
            self.touched = True
            self.buffer, commands = self.escapes.filter(bytes(part[:size]))
            for command in commands:
                self.live.loop.call_soon_threadsafe(lambda command=command: self.on_command(command))
        size = min(len(view), len(self.buffer))
        view[:size], self.buffer = self.buffer[:size], self.buffer[size:]
        return size

    def accepted(self, cap):
        """What was typed is not remembered."""

    def can_rewind(self):
        return not self.touched

    def rewind(self):
        """Nothing has been typed yet."""

    def forget(self):
        """Nothing is remembered."""

    def close(self):
        """The carrier lets go of it; the next one may take it up."""

    def end(self):
        self.live.close()


# ---------------------------------------------------------------- cexec

class WorkerConnection:
    """A connection that came in after an announcement: a worker, if it can show it.

    It says its preamble in plain, waits for the byte GO, and shows the rest of itself in TLS.
    """
    PATIENCE = 10.0         # seconds for everything up to the worker's hello

    def __init__(self, search, connection, address):
        self.search, self.loop, self.address = search, search.loop, address[0]
        self.connection, self.data, self.session, self.closed, self.known = connection, b"", None, False, False
        self.name = self.address        # until it has said its own in TLS
        connection.setblocking(False)
        self.timer = self.loop.call_later(self.PATIENCE, lambda: self.close("silent in the handshake"))
        self.loop.watch(connection.fileno(), read=self._preamble)

    def _preamble(self):
        try:
            part = self.connection.recv(PREAMBLE_SIZE - len(self.data))
        except BlockingIOError:
            return
        except OSError as error:
            return self.close(reason_of(error))
        self.data += part
        if not part:
            return self.close("closed before it said who it was")
        if len(self.data) < PREAMBLE_SIZE and self.data[:4] == MAGIC[:len(self.data)]:
            return
        try:
            offer, _ = parse_preamble(self.search.key.udp, self.search.nonce, self.data)
        except ProtocolError as error:
            return self.close(str(error))
        self.known = True
        self.loop.watch(self.connection.fileno(), read=self._too_early)
        self.search.connected(self, offer[1:])

    def _too_early(self):
        """Nothing may come before GO but the end."""
        try:
            words = "spoke out of turn" if self.connection.recv(1) else "gone before the handshake"
        except BlockingIOError:
            return
        except OSError as error:
            words = reason_of(error)
        self.close(words)

    def handshake(self):
        """It is this one's turn: tells it to go ahead, as the TLS server."""
        self.loop.watch(self.connection.fileno())
        try:
            tune(self.connection)
            self.connection.send(encode_go(self.search.key.udp, self.data))   # while the worker makes ready, so does this side
            self.connection = self.search.context().wrap_socket(
                self.connection, server_side=True, do_handshake_on_connect=False)
        except (OSError, ValueError) as error:
            return self.close(connection_words(error))
        self.loop.watch(self.connection.fileno(), read=self._shake)

    def _shake(self):
        fd = self.connection.fileno()
        try:
            self.connection.do_handshake()
            check_peer(self.connection, self.search.key)
        except ssl.SSLWantReadError:
            return self.loop.watch(fd, read=self._shake)
        except ssl.SSLWantWriteError:
            return self.loop.watch(fd, read=self._shake, write=self._shake)
        except (OSError, ValueError) as error:
            return self.close(connection_words(error))
        self.session = Session(SUBMITTER, self.search.settings.timeout_pingpong, time.monotonic())
        self.loop.watch(fd, read=self._hello)
        self._hello()

    def _hello(self):
        """Reads up to the worker's hello, which also proves that its process is awake."""
        try:
            data = self.connection.recv(CONTROL_MAX)
            # All of it before the job is offered: nothing may follow the hello unasked.
            for kind, _, body in list(self.session.receive(data, time.monotonic())):
                if kind == HELLO:
                    self._authenticated(body)
            if not data:
                self.close("closed in the handshake")
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            pass
        except (OSError, ValueError) as error:
            self.close(connection_words(error))
        except ProtocolError as error:
            self.close("protocol broken: %s" % error)

    def _authenticated(self, body):
        self.name, self.instance = parse_hello(body)
        if not self.search.wanted(self.address, self.name):
            self.close("excluded by CEXEC_ACCEPT_SERVER or CEXEC_REJECT_SERVERS")
        elif self.instance in self.search.avoid:
            self.close("it has failed this job already")
        else:
            self.search.authenticated(self)

    def take(self):
        """Hands the connection over to the caller of this."""
        self.timer.cancel()
        self.closed = True
        self.loop.watch(self.connection.fileno())
        return self.connection

    def close(self, why):
        if self.closed:
            return
        self.closed = True
        self.timer.cancel()
        self.loop.watch(self.connection.fileno())
        self.connection.close()
        self.search.gone(self, why)


CONNECTIONS_MAX = 256           # connections at once at a submitter's port; a stranger's flood ends there


class Discovery:
    """One round of looking for a worker: announcement, candidates, choice.  on_found(caller) is called once."""
    IDLE = 0.01             # seconds: when nobody has come by then, there is time to prepare the channel

    def __init__(self, loop, key, settings, avoid, on_found):
        self.loop, self.key, self.settings, self.avoid, self.on_found = loop, key, settings, avoid, on_found
        self.nonce, self.sequence, self.problems, self.reasons = os.urandom(8), collections.Counter(), [], {}
        self.callers, self.found, self.tls = {}, None, None     # callers in the order of arrival
        self.chooser = Selection(now_ms(), uniform)
        self.group = GroupSocket(settings.group, listen=False)
        try:
            self.listener = open_listener(settings.group, settings.listen_ports)
        except Failure:
            self.group.close()
            raise
        self.port = self.listener.getsockname()[1]
        self.timer = None
        loop.watch(self.listener.fileno(), read=self._accept)
        loop.call_later(self.IDLE, self.context)
        self._act()

    def context(self):
        self.tls = self.tls or tls_context(self.key, server_side=True)
        return self.tls

    def _accept(self):
        for _ in range(64):
            try:
                connection, address = self.listener.accept()
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self._pause_accepting()
                break
            if not self.wanted(address[0]) or not self._make_room():
                connection.close()
                continue
            self.callers[WorkerConnection(self, connection, address)] = None
        self._act()

    def _make_room(self):
        """A worker says who it is within a round trip, so whoever has waited longest without a word goes first."""
        if len(self.callers) >= CONNECTIONS_MAX:
            stranger = next((caller for caller in self.callers if not caller.known), None)
            if stranger is None:
                return False
            stranger.close("silent, and others came")
        return True

    def _pause_accepting(self):
        """Out of descriptors: the connections wait in the backlog until some of ours have ended."""
        self.loop.watch(self.listener.fileno())
        self.loop.call_later(0.1, lambda: self.group and self.loop.watch(self.listener.fileno(), read=self._accept))

    def wanted(self, address, name=None):
        """Whether a worker may be used.  name: its own address, which differs from the connection's behind a proxy."""
        accept, reject = self.settings.accept_server, self.settings.reject_servers
        if address in reject or name in reject:
            return False
        return not (accept and name) or address in accept or name in accept

    # -- what callers report
    def connected(self, caller, offer):
        self.chooser.connected(now_ms(), caller, *offer)
        self._act()

    def authenticated(self, caller):
        self.chooser.authenticated(now_ms(), caller)
        self._act()

    def gone(self, caller, why):
        self.callers.pop(caller, None)
        if not self.found:
            self.reasons = dict(list(self.reasons.items())[-20:], **{caller.name: why})
        self.chooser.closed(now_ms(), caller)
        self._act()

    # -- what the rule wants
    def _act(self):
        if self.group is None:
            return
        for action, *what in self.chooser.poll(now_ms()):
            getattr(self, "_do_" + action)(*what)
        if self.group is None:
            return
        if self.timer:
            self.timer.cancel()
        due = self.chooser.next_due()
        self.timer = self.loop.call_at(due / 1000, self._act) if due is not None else None

    def again(self):
        """Announces now instead of when the timetable says."""
        if self.group and not self.found:
            self.chooser.again = now_ms()
            self._act()

    def _do_announce(self, attempt, waited, interval):
        body = encode_announcement(Announcement(attempt, waited, interval, 0, bytes(8)))
        self.send(ANNOUNCE, body, self.port)

    def _do_hold(self, milliseconds):
        self.send(HOLD, encode_hold(milliseconds))

    def _do_taken(self, offset):
        self.send(TAKEN, encode_taken(offset))

    def _do_handshake(self, caller):
        caller.handshake()

    def _do_evict(self, caller):
        caller.close("slower than another")

    def _do_win(self, caller):
        self.found = caller
        self.callers.pop(caller, None)
        self.on_found(caller)

    def send(self, kind, body, port=0):
        self.sequence[kind] += 1
        self.problems = self.group.send(
            encode_datagram(self.key.udp, kind, self.key.id, self.nonce, self.sequence[kind], body, port))

    def stop(self):
        """Nobody is wanted any more."""
        if self.group is None:
            return
        group, self.group = self.group, None
        if self.timer:
            self.timer.cancel()
        self.loop.watch(self.listener.fileno())
        self.listener.close()
        for caller in list(self.callers):
            caller.close("not needed")
        group.close()


def now_ms():
    return time.monotonic() * 1000


def uniform():
    """A random number in (0, 1]."""
    return (int.from_bytes(os.urandom(7), "big") + 1) / (1 << 56)


class ReplayableSource:
    """A source that can start again: a file by seeking, anything else by remembering what was read, up to a cap.

    Until a worker has accepted the job all is remembered, which the first window bounds: a refusal loses nothing.
    """
    IN_MEMORY = 1 << 20

    def __init__(self, loop, fd, ready):
        self.fd, self.cap, self.recording, self.ended = fd, WINDOW_START, True, False
        self.live, self.start = open_source(loop, fd, ready), self._offset()
        self.store, self.length, self.position = None, 0, 0

    def _offset(self):
        if stream_kind(self.fd) is REGULAR and access_of(self.fd) is IN:
            try:
                return os.lseek(self.fd, 0, os.SEEK_CUR)
            except OSError:
                pass
        return None

    def read_into(self, view):
        if self.position < self.length:
            return self._replay(view)
        if self.ended:
            return 0
        size = self.live.read_into(view)
        if size == 0:
            self.ended = True
        elif size and self.recording and self.start is None:
            self._record(view[:size])
        return size

    def _replay(self, view):
        self.store.seek(self.position)
        size = self.store.readinto(view[:self.length - self.position])
        if not size:
            raise OSError(errno.EIO, "what was kept of the input is damaged")
        self.position += size
        if self.position == self.length and not self.recording:
            self.forget()
        return size

    def _record(self, view):
        if self.length + len(view) > self.cap:
            return self.forget()
        try:
            write_all(self._room(len(view)), view)
            self.length += len(view)
            self.position = self.length
        except OSError:
            self.forget()       # a full disk costs the second chance, not the job

    def _room(self, size):
        import io
        if self.store is None:
            self.store = io.BytesIO()
        if isinstance(self.store, io.BytesIO) and self.length + size > self.IN_MEMORY:
            import tempfile
            memory, self.store = self.store, tempfile.TemporaryFile(buffering=0)
            write_all(self.store, memory.getbuffer())
        self.store.seek(self.length)
        return self.store

    def accepted(self, cap):
        """From now on up to cap bytes are remembered; None for nothing."""
        self.cap = cap or 0
        if cap is None or self.length > self.cap:
            self.forget()

    def can_rewind(self):
        return self.recording

    def rewind(self):
        self.position, self.ended = 0, self.ended and self.start is None
        if self.start is not None:
            os.lseek(self.fd, self.start, os.SEEK_SET)

    def forget(self):
        """From now on there is no second chance."""
        self.recording = False
        if self.store and self.position >= self.length:
            self.store.close()
            self.store, self.length, self.position = None, 0, 0

    def close(self):
        """The carrier lets go of it; the next one may take it up."""

    def end(self):
        self.live.close()


def write_all(store, view):
    """A disk that is nearly full takes a part without an error."""
    while len(view):
        view = view[store.write(view):]


class Submission:
    """One job, from the announcement to its exit status.  Many of them may live in one loop.

    descriptors: {number: IN, OUT, BOTH or the number it shares}, as carried_descriptors gives them.
    on_done(status, failure) is called once; failure is None when the status is the job's own.
    """
    START_PATIENCE = 1.0    # seconds from the offer to the job's start; doubled with each attempt
    TERMINAL_MAX = 2048     # bytes kept free in the job message for a terminal's description
    SIGNAL_GRACE = 10.0     # seconds a job has after INT or TERM
    AVOID = 0.25            # seconds that a worker which failed the job is passed over, doubled with each attempt

    def __init__(self, loop, key, settings, descriptors, names, on_done, terminal=None):
        self.loop, self.key, self.settings, self.names, self.on_done = loop, key, settings, names, on_done
        self.descriptors, self.terminal, self.id = descriptors, terminal, os.urandom(8).hex()
        self.attempts, self.avoid, self.refusals, self.committed, self.done = 0, set(), {}, False, False
        self.alert = None           # the last one sent
        self.patience_from = time.monotonic()
        self.search = self.channel = self.caller = self.exit = None
        self.inputs, self.sinks, self.locals, self.owned = {}, {}, {}, {}
        self.finished_inputs, self.finished_sinks = set(), set()
        self.deadline, self.signalled, self.signals_waiting = None, None, []
        size = len(encode_job(Job(self.id, descriptors, names, 1, None)))
        if size > CONTROL_MAX - self.TERMINAL_MAX:
            raise Failure("NAME=VALUE", "%d bytes in all, at most %d go along" % (
                              size, CONTROL_MAX - self.TERMINAL_MAX),
                          "send what is long through a descriptor", EXIT_USAGE)
        self._open_local()
        self._look_for_worker()

    # -- local descriptors
    def _open_local(self):
        for fd, kind in self.descriptors.items():
            if isinstance(kind, int):
                self.locals[kind].append(fd)
                continue
            self.locals[fd] = [fd]
            if kind == TTY:
                self._open_terminal(fd)
            if kind in (IN, BOTH):
                self.inputs[fd] = ReplayableSource(self.loop, fd, lambda fd=fd: self._source_ready(fd))
            if kind in (OUT, BOTH):
                self._open_sink(fd, self._own(fd) if kind == BOTH else fd)

    def _own(self, fd):
        """A duplicate, so that source and sink can wait for one descriptor each."""
        self.owned[fd] = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, DESCRIPTOR_FLOOR)
        return self.owned[fd]

    def _open_sink(self, fd, own):
        self.sinks[fd] = open_sink(self.loop, own, lambda size: self._consumed(fd, size),
                                   lambda error: self._sink_failed(fd, error), lambda: self._sink_finished(fd))

    def _open_terminal(self, fd):
        terminal = self.terminal
        if terminal.reading is not None:
            self.inputs[fd] = EscapeSource(self.loop, terminal.reading, lambda: self._source_ready(fd),
                                      self.settings.escape if terminal.tty is not None else b"", self._command)
        if terminal.writing is None:
            terminal.writing = os.open("/dev/tty" if terminal.tty is not None else os.devnull, os.O_WRONLY)
        self._open_sink(fd, terminal.writing)

    def _command(self, name):
        """What the user told cexec itself, behind the escape character."""
        if name == "end":
            self._fail(Failure("ended", "by the escape sequence"))
        else:
            suspend(self, self.terminal, signal.SIGTSTP, 0)     # the whole foreground group, as the key does elsewhere

    def _source_ready(self, fd):
        if self.channel:
            self.channel.source_ready(fd)

    def _consumed(self, fd, size):
        if self.channel and not self.channel.closed:
            self.channel.consumed(fd, size)

    def _sink_failed(self, fd, error):
        if self.descriptors[fd] == TTY and error.errno == errno.EIO:
            return self.hang_up()
        reset = error.errno == errno.ECONNRESET and fd in self.inputs and not self.inputs[fd].ended
        if error.errno not in (errno.EPIPE, errno.ECONNRESET) or reset:     # its input may be cut short
            self._fail(Failure("the terminal" if self.descriptors[fd] == TTY else name_of(fd), reason_of(error),
                               "what the job wrote there is incomplete"))
            return
        self.finished_sinks.add(fd)
        self._let_go(fd)
        if self.channel and not self.channel.closed and self.channel.session.phase is RUNNING:
            self.channel.session.stop(fd)
            self.channel.flush()
        self._maybe_done()

    def _sink_finished(self, fd):
        self.finished_sinks.add(fd)
        self._let_go(fd)
        self._maybe_done()

    def _let_go(self, fd):
        """One direction of a local descriptor is over: whoever is at its other end must see that."""
        if fd in self.owned and fd in self.finished_sinks:
            os.close(self.owned.pop(fd))
        if self.descriptors[fd] == TTY or stream_kind(fd) not in (PIPE, SOCKET):
            return
        if error_descriptor(self.settings) in self.locals[fd]:
            return          # cexec's own last line may have to go there; it ends with the process
        writing = fd in self.sinks and fd not in self.finished_sinks
        reading = fd in self.inputs and fd not in self.finished_inputs
        if not writing and not reading:
            if fd in self.inputs:
                self.inputs[fd].end()
            for number in self.locals[fd]:
                park(number)
        elif reading and stream_kind(fd) is SOCKET:
            with socket.socket(fileno=os.dup(fd)) as half:
                try:
                    half.shutdown(socket.SHUT_WR)
                except OSError:
                    pass        # the other side was faster

    # -- finding a worker
    def _look_for_worker(self):
        limit = self.settings.timeout_accept
        self.deadline = self.loop.call_at(self.patience_from + limit, self._nobody) if limit else None
        self.search = Discovery(self.loop, self.key, self.settings, self.avoid, self._found)

    def _nobody(self):
        self._fail(nobody_answered(self.search, self.settings, self.refusals))

    def _found(self, caller):
        if self.deadline:
            self.deadline.cancel()
        self.caller, self.offered = caller, time.monotonic()
        connection = caller.take()
        local = connection.getsockname()[0]
        self.submitter = local.partition("%")[0]
        session = caller.session
        terminal = self.terminal.describe() if self.terminal else None
        timeout = self.settings.timeout_pingpong
        session.offer(Job(self.id, self.descriptors, self.names, timeout, terminal), self.submitter)
        self.channel = Channel(self.loop, connection, session, self._event, self._lost)
        self.channel.deliver = self._deliver
        self.channel.on_read_error = self._read_error
        self.channel.sinks = self.sinks
        if self.settings.ratout_test:
            self._alert(RATTED_OUT, 0, "test")
        for fd in self.finished_sinks:
            session.stop(fd)        # its reader went while another worker had the job
        patience = self.START_PATIENCE * 2 ** self.attempts if self.settings.retries else self.settings.timeout_pingpong
        self._start_timer = self.loop.call_later(patience, self._not_started)
        for fd, replayable in self.inputs.items():
            if self.descriptors[fd] != TTY:
                self.channel.add_source(fd, replayable)
        self.channel.flush()

    def _started(self):
        self._start_timer.cancel()
        self.channel.session.ping(time.monotonic())
        while self.signals_waiting:
            self.channel.session.signal(self.signals_waiting.pop(0))
        for replayable in self.inputs.values():
            replayable.accepted(self.settings.spill << 20 if self.settings.retries else None)
        if self.terminal:
            self.terminal.raw()
            if self.terminal.number in self.inputs:
                self.channel.add_source(self.terminal.number, self.inputs[self.terminal.number])
                self.channel.flush()

    def _not_started(self):
        if self.channel and not self.channel.closed and self.channel.session.phase is OFFERED:
            self.channel.lost("did not start the job")

    # -- while the job runs
    def _event(self, kind, number, body):
        if kind == ACCEPTED:
            self._started()
        elif kind == REFUSED:
            self._refused(printable(body))
        elif kind == END:
            self._commit()
            self.sinks[number].finish()
        elif kind == STOP:
            self._commit()
            self.channel.drop_source(number)
            self.finished_inputs.add(number)
            self._let_go(number)
        elif kind == EXIT:
            self._exited(body)
        elif kind == ABORT:
            self.channel.lost("gave the job up: %s" % printable(body))
            self._lost("gave the job up: %s" % printable(body))

    def _deliver(self, number, body):
        self._commit()
        self.channel.received_total += len(body)
        return self.sinks[number].feed(body)

    def _commit(self):
        """Something of the job has become visible here: it can never start again."""
        if not self.committed:
            self.committed = True
            for replayable in self.inputs.values():
                replayable.forget()

    def _read_error(self, number, error):
        if self.descriptors[number] == TTY and error.errno == errno.EIO:
            self.loop.call_soon_threadsafe(self.hang_up)
            return None
        if error.errno != errno.EIO or stream_kind(number) is not TERMINAL:
            self._commit()
            self._fail(Failure(name_of(number), reason_of(error)))
        return 0

    def _exited(self, ended):
        missing = [fd for fd, stream in self.channel.session.receiving.items() if stream.state == "open"]
        if missing:
            self._lost("protocol broken: an exit before the end of descriptor %d" % missing[0])
            return
        self.exit = ended
        self._commit()
        self._alert(COMPLETED, ended.status & 255, "")
        self.channel.session.bye()
        self.channel.on_flushed = self.channel.close
        self.channel.flush()
        self._maybe_done()

    def _maybe_done(self):
        if self.exit and all(fd in self.finished_sinks for fd in self.sinks):
            self._finish(self.exit.status, None)

    # -- when a worker is lost
    def _refused(self, words):
        """The job has not started: looking again, as long as there is time, costs nothing."""
        self.channel.close()
        self.refusals[self.caller.name] = "refused: " + words
        self._again("refused the job: %s" % words)

    def _lost(self, words):
        if self.exit or self.done:
            return
        self.channel.close()
        self._start_timer.cancel()
        self._alert(RATTED_OUT, 0, words)
        self.attempts += 1
        if (self.committed or self.attempts > self.settings.retries or self.signalled
                or not all(replayable.can_rewind() for replayable in self.inputs.values())):
            self._fail(Failure("worker %s" % self.caller.name, words, self._advice()))
        else:
            self.patience_from = time.monotonic()
            self._again(words)

    def _forgive(self, instance):
        """Nobody else has come by now: the worker that failed may try again."""
        self.avoid.discard(instance)
        if not self.done:
            self.search.again()

    def _advice(self):
        if self.committed:
            return "its output had begun, so it was not started elsewhere; run it again if that does no harm"
        return "run it again"

    def _again(self, words):
        """Another worker gets the same job, with the same input."""
        if self.terminal:
            self.terminal.restore()
        self.avoid.add(self.caller.instance)
        self._start_timer.cancel()
        self.loop.call_later(self.AVOID * 2 ** self.attempts, lambda instance=self.caller.instance: self._forgive(instance))
        self.search.stop()
        try:
            for replayable in self.inputs.values():
                replayable.rewind()
        except OSError as error:
            self._fail(Failure("worker %s" % self.caller.name, words,
                               "the input cannot be read again: %s" % reason_of(error)))
            return
        self.channel = None
        self._look_for_worker()

    def _alert(self, verdict, status, words):
        took = int((time.monotonic() - self.offered) * 1000)
        alert = Alert(verdict, status, min(took, 0xffffffff), int(time.time() * 1000), self.id, self.submitter,
                      self.caller.name, words)
        search = self.search
        search.sequence[ALERT] += 1
        data = encode_datagram(self.key.udp, ALERT, self.key.id, search.nonce, search.sequence[ALERT],
                                 encode_alert(alert))
        self.alert = data
        for _ in range(2 if verdict == RATTED_OUT else 1):
            search.group.send(data)

    # -- signals and the end
    def signal(self, name):
        """The user's signal goes to the job; a second INT or TERM, or a job that ignores it, ends all the same."""
        channel, ends = self.channel, name in ("INT", "TERM")
        if not self.is_running() or (ends and self.signalled):
            if ends or name in ("HUP", "QUIT"):
                self._finish(128 + getattr(signal, "SIG" + name), None)
            elif name in ("USR1", "USR2"):
                self.signals_waiting.append(name)
            return
        if ends:
            self.signalled = name
            self.loop.call_later(self.SIGNAL_GRACE, lambda: self._finish(128 + getattr(signal, "SIG" + name), None))
        channel.session.signal(name)
        channel.flush()

    def is_running(self):
        return bool(self.channel and not self.channel.closed and self.channel.session.phase in (OFFERED, RUNNING))

    def hang_up(self):
        """The user's terminal has gone.  A job that lives on it ends; another one decides for itself."""
        self.signal("HUP")
        if self.terminal:
            self._finish(128 + signal.SIGHUP, None)

    def resize(self, rows, columns):
        if self.is_running():
            self.channel.session.window(rows, columns)
            self.channel.flush()

    def _fail(self, failure):
        self._finish(failure.status, failure)

    def _finish(self, status, failure):
        if self.done:
            return
        self.done = True
        if self.alert and self.search.group:
            self.search.group.send(self.alert)      # again, so that a lost datagram loses no line
        if self.deadline:
            self.deadline.cancel()
        if self.channel:
            self.channel.close()
        if self.search:
            self.search.stop()
        self.on_done(status, failure)


def name_of(fd):
    return ("standard input", "standard output", "standard error")[fd] if fd < 3 else "descriptor %d" % fd


def nobody_answered(search, settings, refusals):
    """The one line for a search that found nobody: what was tried, what came of it, what to check."""
    why = "nobody answered within %g s; announced on %s by %s, to connect back to TCP port %d" % (
        settings.timeout_accept, settings.group, " ".join(filter(None, search.group.tried)) or "the system's choice",
        search.port)
    if search.problems:
        why += "; could not send: " + ", ".join(search.problems)
    for name, reason in list(dict(search.reasons, **refusals).items())[-3:]:
        why += "; %s: %s" % (name, reason)
    return Failure("no worker", why, "is cservice running with this key (%s) in this network, with a free slot?  "
                   "do firewalls pass UDP port %d to it and TCP back?" % (search.key.fingerprint, settings.group.port))


COLLECT_AFTER = 1.0         # seconds; a job that ends before leaves its garbage to the system
DESCRIPTOR_FLOOR = 64       # where duplicates of our own go: out of the way of what the user numbers


def cexec(arguments, settings):
    """cexec APP[.pub] [NAME=VALUE...]"""
    inherited = carried_descriptors(settings.max_fd)
    for fd in set((0, 1, 2)) - set(open_descriptors(2)):
        park(fd)
    if settings.errors_fd is not None:
        check_errors_fd(settings)
    if not arguments:
        raise Failure("no key given", "", "usage: cexec APP[.pub] [NAME=VALUE...]", EXIT_USAGE)
    names = [parse_name(word) for word in arguments[1:]]
    key, warning = load_key(arguments[0], "public")
    if warning:
        say(CEXEC, warning, error_descriptor(settings))
    terminal = LocalTerminal(settings, inherited) if settings.terminal else None
    if terminal and not terminal.is_ours():
        os.kill(0, signal.SIGTTOU)      # started in the background: stops until it gets the terminal, as editors do
    try:
        status, failure = run_submission(key, settings, inherited, names, terminal)
    finally:
        if terminal:
            terminal.restore()
    if failure:
        raise failure
    return status


def run_submission(key, settings, descriptors, names, terminal):
    """Runs one job in a loop of its own, with the process's signals; returns (status, failure or None)."""
    loop = Loop()
    submission = Submission(loop, key, settings, descriptors, names, lambda *outcome: loop.stop(outcome), terminal)
    calls = {getattr(signal, "SIG" + name): lambda number, name=name: submission.signal(name)
             for name in ("INT", "TERM", "QUIT", "USR1", "USR2")}
    calls[signal.SIGHUP] = lambda number: submission.hang_up()
    for number in (signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU):
        calls[number] = lambda number: suspend(submission, terminal, number)
    calls[signal.SIGCONT] = lambda number: resume(submission, terminal)
    if terminal and terminal.tty is not None:
        calls[signal.SIGWINCH] = lambda number: submission.resize(*terminal.size())
    for number, call in calls.items():
        loop.on_signal_unless_ignored(number, call)
    loop.call_later(COLLECT_AFTER, gc.enable)
    return loop.run()


def suspend(submission, terminal, number, whom=None):
    """Stops this process, or whom, as if nothing had caught the signal; a job without a terminal stops too."""
    submission.signal("TSTP")
    if terminal:
        terminal.restore()
    if number == signal.SIGTSTP or in_background():
        handler = signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid() if whom is None else whom, number)
        signal.signal(number, handler)      # here it has been continued, or nobody could ever have continued it
    resume(submission, terminal)


def in_background():
    """Whether the controlling terminal is another process group's at the moment."""
    try:
        with open("/dev/tty") as terminal:
            return os.tcgetpgrp(terminal.fileno()) != os.getpgrp()
    except OSError:
        return False


def resume(submission, terminal):
    submission.signal("CONT")
    if terminal and submission.is_running():
        terminal.raw()
        submission.resize(*terminal.size())


def check_errors_fd(settings):
    if settings.errors_fd <= settings.max_fd:
        raise Failure("CEXEC_FD_FOR_ERRORS=%d" % settings.errors_fd, "not above CEXEC_MAXFD (%d)" % settings.max_fd,
                      "the job would share it", EXIT_USAGE)
    try:
        os.fstat(settings.errors_fd)
    except OSError:
        raise Failure("CEXEC_FD_FOR_ERRORS=%d" % settings.errors_fd, "not open", "", EXIT_USAGE) from None


def error_descriptor(settings):
    return 2 if settings.errors_fd is None else settings.errors_fd


def parse_name(word):
    name, equals, value = os.fsencode(word).partition(b"=")
    if not equals or not is_name(name):
        raise Failure(word, "not NAME=VALUE", "the job finds VALUE in its environment as PEER_NAME", EXIT_USAGE)
    return name, value


# ---------------------------------------------------------------- cservice

class SubmitterConnection:
    """A connection to a submitter that has not given the word yet."""
    CONNECT, WORD = 5.0, 15.0       # seconds to connect; to be told to go ahead or away

    def __init__(self, service, answer, place):
        self.service, self.loop, self.answer, self.done = service, service.loop, answer, False
        self.place, self.began = place, time.monotonic()
        self.preamble = encode_preamble(service.key.udp, answer, os.urandom(8))
        self.word = b""
        self.socket = socket.socket(socket.AF_INET6 if ":" in place[0] else socket.AF_INET, socket.SOCK_STREAM)
        self.timer = self.loop.call_later(self.CONNECT, lambda: self.end(False))
        try:
            self.socket.setblocking(False)
            tune(self.socket)
            problem = self.socket.connect_ex(place)
        except OSError as error:
            problem = error.errno
        if problem not in (0, errno.EINPROGRESS):
            self.loop.call_soon_threadsafe(lambda: self.end(problem == errno.ECONNREFUSED))
        else:
            self.loop.watch(self.socket.fileno(), write=self._connected)

    def _connected(self):
        answer, problem = self.answer, self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if problem:
            return self.end(problem == errno.ECONNREFUSED)
        try:
            self.socket.send(self.preamble)
        except OSError:
            return self.end(False)
        self.timer.cancel()
        self.timer = self.loop.call_later(self.WORD, lambda: self.end(False))
        self.loop.watch(self.socket.fileno(), read=self._word)

    def _word(self):
        try:
            part = self.socket.recv(GO_SIZE - len(self.word))
        except BlockingIOError:
            return None
        except OSError:
            part = b""
        self.word += part
        if part and len(self.word) < GO_SIZE:
            return None
        if not hmac.compare_digest(self.word, encode_go(self.service.key.udp, self.preamble)):
            return self.end(False)
        self.release()
        self.service.fork(self)

    def release(self):
        self.done = True
        self.timer.cancel()
        self.loop.watch(self.socket.fileno())
        self.service.calls.discard(self)

    def end(self, refused):
        """No job from there."""
        if not self.done:
            self.release()
            self.socket.close()
            self.service.lost(self.answer, refused)


class HandlerProcess:
    """What the daemon knows of one handler process: its pid, the link to it, and its job's process group."""

    def __init__(self, pid, link, answer, address):
        self.pid, self.link, self.answer, self.address = pid, link, answer, address
        self.won = self.ended = False
        self.group, self.job, self.words = None, None, b""


class Daemon:
    """The worker's daemon: hears announcements, answers the ones the rule picks, forks a handler for each job."""
    ANSWERED = 512             # nonces of the own connections that an alert may still speak of
    STALE = 1.0             # seconds after which a silent submitter makes room
    MUTE = 10000.0          # milliseconds that a ratted out worker holds back
    PLACES = 2048           # announcements whose addresses are remembered; above what the responder remembers

    def __init__(self, loop, key, settings, command, log):
        self.loop, self.key, self.settings, self.command, self.log = loop, key, settings, command, log
        self.path = find_command(command[0])
        self.context = tls_context(key, server_side=False)
        self.group = GroupSocket(settings.group, listen=True)
        self.responder = Responder(settings.concurrency, usable_cpus(), measured_speed(), uniform, settings.boost)
        self.meter = LoadMeter()
        self.places, self.recent = collections.OrderedDict(), collections.OrderedDict()
        self.calls, self.workers, self.ends, self.timer = set(), {}, set(), None
        self.instance, self.draining = os.urandom(8).hex(), False
        self.versions_heard, self.hears_alerts = 0, None
        self._choose_datagrams()
        loop.watch(self.group.fileno(), read=self._heard)
        loop.on_signal(signal.SIGCHLD, lambda number: self._reap())
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.on_signal_unless_ignored(number, self._stop)
        loop.on_signal(signal.SIGHUP, lambda number: None)
        loop.call_later(1.0, self._sample)
        self._refresh()

    def ready(self):
        self.log("ready: key %s, group %s, %d slots, command %s%s" % (
            self.key.fingerprint, self.settings.group, self.settings.concurrency, self.path,
            ", jobs run as %s" % self.settings.user.pw_name if self.settings.user else ""), always=True)
        if os.geteuid() == 0 and not self.settings.user:
            self.log("warning: jobs run as root; --user NAME gives them another user's rights", always=True)

    # -- the network
    def _heard(self):
        changed = False
        for _ in range(256):
            received = self.group.receive()
            if received is None:
                break
            changed = self._datagram(*received[:2]) or changed
        if changed:
            self.consider()

    def _datagram(self, data, source):
        """Acts on one datagram; returns whether it was worth anything."""
        try:
            datagram = parse_datagram(data)
            if datagram.key_id == self.key.id and self._matters(datagram) and datagram.authentic(self.key.udp):
                getattr(self, "_" + DATAGRAM_NAMES[datagram.kind])(datagram, source)
                return True
        except ProtocolError as error:
            if data[:4] == MAGIC and data[4:5] != bytes([WIRE_VERSION]):
                self.versions_heard += 1
                if self.versions_heard == 1:
                    self.log("from %s: %s" % (source[0], error))
        return False

    def _matters(self, datagram):
        """Most of what a worker hears is about jobs of others, and not worth an HMAC."""
        if datagram.kind == HOLD:
            return datagram.nonce in self.responder.calls
        if datagram.kind == TAKEN:
            return self.responder.answered.get(datagram.nonce) != LEARNT
        return datagram.kind != ALERT or datagram.nonce in self.recent

    def _choose_datagrams(self):
        """Alerts concern only a worker that has had a job which none has spoken of yet."""
        if self.hears_alerts != bool(self.recent):
            self.hears_alerts = bool(self.recent)
            self.group.pass_only(self.key.id, (ANNOUNCE, HOLD, TAKEN) + (ALERT,) * self.hears_alerts)

    def _announce(self, datagram, source):
        attempt, waited, interval = parse_announcement(datagram)[:3]
        if datagram.port < 1024 or self.draining:
            return
        place = (source[0], datagram.port) + tuple(source[2:])
        places = self.places.setdefault(datagram.nonce, [])
        if place not in places and len(places) < 4:
            places.append(place)        # a host with several interfaces is heard by several addresses
        while len(self.places) > self.PLACES:
            self.places.popitem(last=False)
        self.responder.announced(now_ms(), datagram.nonce, source[0], attempt, waited, interval)

    def _hold(self, datagram, source):
        self.responder.hold(now_ms(), datagram.nonce, parse_hold(datagram))

    def _taken(self, datagram, source):
        self.responder.taken(now_ms(), datagram.nonce, parse_taken(datagram))

    def _alert(self, datagram, source):
        """Only an alert about a connection that this worker really made counts, and each of those once."""
        alert = parse_alerts(datagram)[0]
        known = self.recent.pop(datagram.nonce, None)
        self._choose_datagrams()
        if known is None or alert.words == "test":
            return
        self.responder.penalise(now_ms(), self.MUTE if alert.verdict == RATTED_OUT else 0)
        if alert.verdict == RATTED_OUT:
            self.log("ratted out by %s: %s; holding back for %d s" % (alert.submitter, alert.words, self.MUTE / 1000))
        self.consider()

    def consider(self):
        """Asks the rule what is due, does it, and comes back when it wants to be asked again."""
        if self.timer:
            self.timer.cancel()
            self.timer = None
        if self.draining:
            return
        for answer in self.responder.due(now_ms()):
            self._connect(answer)
        due = self.responder.next_due()
        if due is not None:
            self.timer = self.loop.call_at(due / 1000, self.consider)

    def _connect(self, answer):
        places = self.places.get(answer.nonce)
        try:
            if not places:
                raise OSError
            places.append(places.pop(0))        # the next attempt tries the next address
            self.calls.add(SubmitterConnection(self, answer, places[-1]))
        except OSError:                         # out of descriptors, for one
            self.loop.call_soon_threadsafe(lambda: self.lost(answer))

    def lost(self, answer, refused=False):
        """No job has come of this connection."""
        self.responder.lost(answer.nonce, refused)
        self.consider()

    def _drop_stale(self):
        """Who was called a while ago and gives no word keeps no slot from those who wait: he may only have recorded
        somebody's announcements."""
        if self.responder.calls and self.responder.running >= self.responder.slots:
            for call in [call for call in self.calls if time.monotonic() - call.began > self.STALE]:
                call.end(False)

    def _sample(self):
        self._drop_stale()
        self.responder.load(now_ms(), self.meter.read([worker.group for worker in self.workers.values() if worker.group]))
        self.loop.call_later(1.0, self._sample)

    def _refresh(self):
        self.group.refresh()
        self.loop.call_later(10.0, self._refresh)

    # -- handlers
    def fork(self, call):
        """The submitter has given the word: a process of its own goes on from here."""
        address = call.place[0]
        self._expect_alert(call.answer.nonce)      # before any can be here
        try:
            link, far = socket.socketpair()
            pid = os.fork()
        except OSError as error:
            self.log("no process for a job from %s: %s" % (address, reason_of(error)))
            call.socket.close()
            return self.lost(call.answer)
        if pid == 0:
            self._become_handler(call, link, far)
        far.close()
        call.socket.close()
        link.setblocking(False)
        worker = self.workers[pid] = HandlerProcess(pid, link, call.answer, address)
        self.loop.watch(link.fileno(), read=lambda: self._told(worker))

    def _expect_alert(self, nonce):
        self.recent[nonce] = True
        while len(self.recent) > self.ANSWERED:
            self.recent.popitem(last=False)
        self._choose_datagrams()

    def _become_handler(self, call, link, far):
        """In the forked child: runs the job and ends.  Nothing here may raise or return."""
        status = 1
        try:
            os.setsid()         # a Ctrl-C at the daemon's terminal is for the daemon
            link.close()
            self._forget_all()
            status = Handler(self, call.socket, call.answer.nonce, far).run()
        except BaseException as error:
            say("cservice", "handler: %s: %s" % (type(error).__name__, error))
        finally:
            os._exit(status)

    def _forget_all(self):
        """In a handler: lets go of everything that is the daemon's."""
        self.loop.close()
        self.group.close()
        for call in self.calls:
            call.socket.close()
        for worker in self.workers.values():
            worker.link.close()

    def _told(self, worker):
        try:
            words = worker.link.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            words = b""
        if not words:
            self.loop.watch(worker.link.fileno())
            return
        worker.words += words
        *lines, worker.words = worker.words.split(b"\n")
        for line in lines:
            name, _, value = line.decode().partition(" ")
            getattr(self, "_told_" + name)(worker, value)
        self.consider()

    def _told_won(self, worker, job):
        worker.won, worker.job = True, job
        self.responder.won(worker.answer.nonce)

    def _told_group(self, worker, group):
        worker.group = int(group)

    def _told_over(self, worker, value):
        """The job has ended; its handler only says goodbye."""
        worker.group = None
        self._free(worker)

    def _told_ended(self, worker, value):
        worker.group = None

    def _free(self, worker):
        if worker.ended:
            return
        worker.ended = True
        if worker.won:
            self.responder.freed()
        else:
            self.responder.lost(worker.answer.nonce)

    def _reap(self):
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if not pid:
                break
            if pid in self.workers:
                self._handler_ended(self.workers[pid], status)
        self.consider()
        self._maybe_over()

    def _handler_ended(self, worker, status):
        self._told(worker)
        del self.workers[worker.pid]
        self.loop.watch(worker.link.fileno())
        worker.link.close()
        if worker.group:
            self.log("job %s: its handler was killed; the job ends" % worker.job)
            self._end_group(worker.group, worker)
        elif worker.won and not worker.ended and os.WIFSIGNALED(status):
            self.ends.add(worker)               # a drain waits for this too
            for wait in 0.0, 0.1, 1.0:          # its job may be anywhere between fork and exec
                self.loop.call_later(wait, lambda: self._end_strays(worker.job))
            self.loop.call_later(1.0 + KILL_GRACE, lambda: self._group_ended(worker, worker))
        else:
            self._free(worker)

    def _end_strays(self, job):
        """The handler was killed before it could say which group its job has."""
        for leader in sessions_of(job):
            self._end_group(leader, None)

    def _end_group(self, leader, worker):
        end = GroupKill(self.loop, leader, lambda: self._group_ended(end, worker))
        self.ends.add(end)

    def _group_ended(self, end, worker):
        """worker, if any, is the one whose slot this gives back."""
        self.ends.discard(end)
        if worker:
            self._free(worker)
            self.consider()
        self._maybe_over()

    # -- the end
    def _stop(self, number):
        if self.draining:
            self._kill()
            return
        self.draining = True
        running = sum(1 for worker in self.workers.values() if worker.won and not worker.ended)
        name = signal.Signals(number).name
        self.log("%s: no new jobs, %d running; again to kill them" % (name, running), always=True)
        self.loop.watch(self.group.fileno())
        for call in list(self.calls):
            call.end(False)
        for worker in self.workers.values():
            if not worker.won:
                signal_process(worker.pid, signal.SIGTERM)
        self._maybe_over()

    def _kill(self):
        for worker in self.workers.values():
            signal_process(worker.pid, signal.SIGTERM)

    def _maybe_over(self):
        if self.draining and not self.workers and not self.ends:
            self.log("done", always=True)
            self.loop.stop(0)


def sessions_of(job):
    """The sessions whose processes have this job's id in their environment (Linux)."""
    mark, found = b"CEXEC_JOB=" + job.encode(), set()
    for pid in process_ids():
        try:
            with open("/proc/%s/environ" % pid, "rb") as file:
                if mark in file.read().split(b"\0"):
                    found.add(os.getsid(int(pid)))
        except OSError:
            pass        # it has ended, or is another user's
    return found - {os.getsid(0)}


def signal_process(pid, number):
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


class LoadMeter:
    """How many processes have wanted a CPU since the last look, the own jobs left out.

    Up to the number of CPUs it is the time that they were busy, which no sampling misses; what waits beyond that shows
    only in the run queue of the moment.  Both from /proc (Linux); elsewhere the one minute load average.
    """
    TICKS = os.sysconf("SC_CLK_TCK")

    def __init__(self):
        self.cpus, self.busy, self.total, self.own, self.stamp = os.cpu_count() or 1, 0, 0, {}, time.monotonic()
        self.read([])

    def read(self, leaders):
        """leaders: the pids of the own jobs."""
        try:
            return max(0.0, self._busy() - self._own(leaders)) + max(0, self._queue() - self.cpus - len(leaders))
        except (OSError, ValueError, IndexError):
            return max(0.0, self._average() - len(leaders))

    def _busy(self):
        """CPUs that were busy, on average."""
        with open("/proc/stat") as file:
            ticks = [int(word) for word in file.readline().split()[1:9]]
        total, busy = sum(ticks), sum(ticks) - ticks[3] - ticks[4]      # less idle, and idle with a disk to wait for
        answered, passed = busy - self.busy, total - self.total
        self.busy, self.total = busy, total
        return self.cpus * answered / passed if passed > 0 else 0.0

    def _own(self, leaders):
        """CPUs that the own jobs kept busy: a job that sleeps takes nothing from the next one."""
        now, known, used = time.monotonic(), {}, 0
        for pid in leaders:
            for member in family(pid):
                known[member] = cpu_ticks(member)
                used += known[member] - self.own.get(member, 0)
        passed, self.own, self.stamp = now - self.stamp, known, now
        return used / self.TICKS / passed if passed > 0 else 0.0

    def _queue(self):
        with open("/proc/loadavg") as file:
            return int(file.read().split()[3].partition("/")[0]) - 1     # less this very process

    def _average(self):
        try:
            return os.getloadavg()[0]
        except OSError:
            return 0.0


def family(pid):
    """A process and its descendants, as far as the system tells (Linux)."""
    found, look = [], [pid]
    while look and len(found) < 1000:
        member = look.pop()
        found.append(member)
        try:
            with open("/proc/%d/task/%d/children" % (member, member)) as file:
                look += map(int, file.read().split())
        except OSError:
            pass
    return found


def cpu_ticks(pid):
    """CPU time of a process and of the children that it has waited for; 0 when it has gone."""
    try:
        with open("/proc/%d/stat" % pid, "rb") as file:
            return sum(map(int, file.read().rpartition(b")")[2].split()[11:15]))
    except (OSError, ValueError):
        return 0


def measured_speed():
    """This machine's speed by a tiny computation; 1 is a laptop of 2020.

    The best of many short looks, each too short to be interrupted often.  Not rounded: two machines of a kind would
    fall on two sides of a step, and then the slower one's name would weigh more than a job.
    """
    block, best = bytes(1 << 14), float("inf")
    for _ in range(200):
        start = time.perf_counter()
        hashlib.blake2b(block).digest()
        best = min(best, time.perf_counter() - start)
    return max(0.125, min(8.0, 17e-6 / best))


def find_command(name):
    """The path of an executable file, as a shell would find it."""
    candidates = [name] if "/" in name else [
        os.path.join(folder or ".", name) for folder in os.environ.get("PATH", os.defpath).split(os.pathsep)]
    found = None
    for path in candidates:
        if os.path.isfile(path):
            found = found or path
            if os.access(path, os.X_OK):
                return os.path.abspath(path)
    raise Failure(name or "an empty COMMAND", "not executable: %s" % found if found else "command not found",
                  "COMMAND is a program of this machine, run without a shell", EXIT_USAGE)


class Handler:
    """One job on the worker, in a process of its own: channel, job, streams."""
    PATIENCE = 15.0         # seconds for handshake and job message

    def __init__(self, service, connection, nonce, link):
        self.service, self.settings, self.key, self.log = service, service.settings, service.key, service.log
        self.link, self.raw = link, connection
        self.loop = Loop()
        self.pid = self.job = self.ended = self.ending = self.remains = self.master = self.slave = None
        self.ends, self.closing, self.began = {}, [], time.monotonic()
        self.result = 0

    # -- the channel
    def run(self):
        try:
            connection = self._shake()
        except (OSError, ValueError) as error:
            if isinstance(error, ssl.SSLError) and not isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError)):
                self.log("from %s: %s" % (self.peer[0], connection_words(error)))
            return 1        # a connection that just ends was not needed any more
        for number in (signal.SIGTERM, signal.SIGINT):
            self.loop.on_signal(number, lambda number: self.give_up("the worker was told to stop"))
        self.loop.on_signal(signal.SIGHUP, lambda number: None)
        self.loop.on_signal(signal.SIGCHLD, lambda number: self.reap())
        session = Session(WORKER, 60.0, time.monotonic())
        session.hello(self.local.partition("%")[0], self.service.instance)
        self.channel = Channel(self.loop, connection, session, self.event, self.lost)
        self.channel._source_ended = self.source_ended
        self.link.setblocking(False)
        self.loop.watch(self.link.fileno(), read=lambda: self.give_up("the worker was killed"))
        self.timer = self.loop.call_later(self.PATIENCE, lambda: self.channel.lost("no job came"))
        return self.loop.run()

    def _shake(self):
        self.peer, self.local = self.raw.getpeername(), self.raw.getsockname()[0]
        self.server_port = self.raw.getsockname()[1]
        self.raw.settimeout(self.PATIENCE)
        connection = self.service.context.wrap_socket(self.raw, do_handshake_on_connect=False)
        connection.do_handshake()
        check_peer(connection, self.key)
        return connection

    def tell(self, words):
        try:
            self.link.send(words.encode() + b"\n")
        except OSError:
            pass        # the daemon has gone; the link's end says so too

    # -- events of the session
    def event(self, kind, number, body):
        if kind == WELCOME:
            self.remote = parse_welcome(body)
        elif kind == JOB:
            self.start(body)
        elif kind == END:
            self.channel.sinks[number].finish()
        elif kind == STOP:
            self.channel.drop_source(number)
            self.close_end(number, reading=True)
            self.maybe_over()
        elif kind == SIGNAL:
            self.signal(body)
        elif kind == WINDOW and self.master is not None:
            set_window(self.master, *body)
        elif kind == BYE:
            self.finish(0)

    def signal(self, name):
        """A terminal's job is not stopped when only its user's cexec is suspended.  Another one is stopped for good:
        its group has no parent in its session, and for such an orphan TSTP has no effect."""
        if self.has_group() and not (self.job.terminal and name in ("TSTP", "CONT")):
            signal_group(self.pid, signal.SIGSTOP if name == "TSTP" else getattr(signal, "SIG" + name))

    def start(self, job):
        """Runs the command with the submitter's descriptors, or refuses."""
        self.job = job
        self.timer.cancel()
        self.channel.tick()         # the job has brought its own timeout
        self.tell("won " + job.id)
        try:
            theirs = self.open_ends(job)
            if self.settings.user:
                if self.slave is not None:
                    os.fchown(self.slave, self.settings.user.pw_uid, -1)
                become_user(self.settings.user)
            self.pid = spawn(self.service.path, self.service.command, self.environment(job), theirs, self.slave)
        except (OSError, ValueError) as error:
            self.refuse("%s: %s" % (self.service.path, reason_of(error)))
            return
        finally:
            for fd in self.closing:
                os.close(fd)
            self.closing = []
        self.tell("group %d" % self.pid)
        self.log("job %s: start from %s, pid %d" % (job.id, self.remote_text(), self.pid))
        self.channel.session.accept(time.monotonic())
        self.attach()
        self.channel.flush()

    def remote_text(self):
        peer = self.peer[0].partition("%")[0]
        return self.remote if self.remote == peer else "%s by %s" % (self.remote, peer)

    def refuse(self, words):
        self.log("job %s: refused to %s: %s" % (self.job.id, self.remote_text(), words))
        self.channel.session.refuse(words)
        self.channel.on_flushed = lambda: self.finish(0)
        self.channel.flush()

    def environment(self, job):
        environment = {name: value for name, value in os.environb.items() if not name.startswith(b"PEER_")}
        peer = self.peer
        environment.update({
            b"REMOTE_ADDR": self.remote.encode(), b"REMOTE_PORT": b"%d" % peer[1],
            b"SERVER_ADDR": self.local.partition("%")[0].encode(), b"SERVER_PORT": b"%d" % self.server_port,
            b"CEXEC_JOB": job.id.encode()})
        environment.update({b"PEER_" + name: value for name, value in job.names})
        if job.terminal:
            environment[b"TERM"] = job.terminal[2]
            for name in (b"LINES", b"COLUMNS"):     # of the terminal that cservice was started from
                environment.pop(name, None)
        return environment

    # -- descriptors of the job
    def open_ends(self, job):
        """Makes the pipes and socket pairs; returns {descriptor in the job: descriptor here}."""
        theirs, limit = {}, os.sysconf("SC_OPEN_MAX")
        if 0 < limit <= 2 * max(job.descriptors, default=0) + 64:
            raise OSError(errno.EMFILE, "descriptor %d is too high for this machine's limit of %d" % (
                max(job.descriptors), limit))
        for fd, kind in job.descriptors.items():
            if isinstance(kind, int):
                theirs[fd] = theirs[kind]
                continue
            ours, other = self.make_terminal(job.terminal) if kind == TTY else self.make_end(kind)
            if kind != TTY:
                self.closing.append(other)
            self.ends[fd], theirs[fd] = ours, other
        return theirs

    def make_terminal(self, terminal):
        """Its slave stays open here: what the job makes of its own descriptors must not look like the end."""
        import pty
        self.master, self.slave = pty.openpty()
        os.set_blocking(self.master, False)
        rows, columns, _, modes = terminal
        set_terminal(self.slave, rows, columns, modes)
        return self.master, self.slave

    def make_end(self, kind):
        if kind == BOTH:
            ours, other = socket.socketpair()
            return ours.detach(), other.detach()
        reading, writing = os.pipe()
        ours, other = (writing, reading) if kind == IN else (reading, writing)
        os.set_blocking(ours, False)
        enlarge_pipe(ours)
        return ours, other

    def attach(self):
        for fd, ours in list(self.ends.items()):
            kind = self.job.descriptors[fd]
            source, sink = {BOTH: (SocketSource, SocketSink),
                            TTY: (TerminalSource, TerminalSink)}.get(kind, (Source, Sink))
            if kind in UPWARD:
                self.channel.sinks[fd] = sink(self.loop, ours, lambda size, fd=fd: self.channel.consumed(fd, size),
                                              lambda error, fd=fd: self.sink_failed(fd),
                                              lambda fd=fd: self.close_end(fd, writing=True))
                self.channel.sinks[fd].watch_other_side()
            if kind in DOWNWARD:
                self.channel.add_source(fd, source(self.loop, ours, lambda fd=fd: self.channel.source_ready(fd)))

    def sink_failed(self, fd):
        """The job reads this descriptor no more."""
        self.close_end(fd, writing=True)
        if not self.channel.closed and self.channel.session.phase is RUNNING:
            self.channel.session.stop(fd)
            self.channel.flush()

    def source_ended(self, number):
        """The job has closed its end, or shut down its half of a socket pair."""
        channel, both = self.channel, self.job.descriptors[number] == BOTH
        if both and number in self.ends and is_hung_up(self.ends[number]):
            channel.session.stop(number)
            channel.sinks[number].close()
        channel.drop_source(number)
        channel.session.end(number)
        if not both:
            self.close_end(number)
        self.maybe_over()

    def close_end(self, fd, reading=False, writing=False):
        """Shuts one direction of our end, or closes a pipe's."""
        ours = self.ends.get(fd)
        if ours is None:
            return
        if self.job.descriptors[fd] == TTY:
            return          # it stays until the job ends: closing it hangs up
        if self.job.descriptors[fd] == BOTH:
            with socket.socket(fileno=os.dup(ours)) as half:
                try:
                    half.shutdown(socket.SHUT_RD if reading else socket.SHUT_WR)
                except OSError:
                    pass        # the job has closed its end already
        else:
            del self.ends[fd]
            self.loop.watch(ours)
            os.close(ours)

    # -- the job's end
    def reap(self):
        if not self.pid or self.ended:
            return
        pid, status, usage = os.wait4(self.pid, os.WNOHANG)
        if not pid:
            return
        signalled = os.WIFSIGNALED(status)
        number = os.WTERMSIG(status) if signalled else os.WEXITSTATUS(status)
        name = signal.Signals(number).name[3:] if signalled and number in signal.Signals.__members__.values() else ""
        self.ended = ExitReport(signalled, False, number, int((time.monotonic() - self.began) * 1000),
                           int((usage.ru_utime + usage.ru_stime) * 1000),
                           usage.ru_maxrss // (1024 if MACOS else 1), name, {})
        self.maybe_over()

    def maybe_over(self):
        """The job is over when its process has ended and every output is at its end and sent.

        A terminal's output ends when nobody has it open, so there the rest of the session ends first."""
        session = self.channel.session
        if self.channel.closed or not self.ended or session.phase is not RUNNING:
            return
        if self.slave is not None and self.remains is None:
            self.remains = GroupKill(self.loop, self.pid, self.cleared)
        elif all(stream.state == "ended" for stream in session.sending.values()):
            if self.remains is None and self.has_group():
                self.remains = GroupKill(self.loop, self.pid, self.cleared, whole=False)
            elif self.remains in (None, True):
                self.report()

    def has_group(self):
        """Whether the job's group is there.  When its leader has ended its number may be somebody else's by now."""
        if not self.pid or (self.ended and not signal_group(self.pid, 0)):
            return False
        return not self.ended or self.pid in session_groups(self.pid)

    def cleared(self):
        """Nothing of the job is left."""
        self.remains = True
        for number, source in list(self.channel.sources.items()):
            if isinstance(source, TerminalSource):
                source.ending = True
                self.channel.source_ready(number)
        self.maybe_over()

    def report(self):
        """The last message.  The slot is free from here on."""
        if self.channel.closed:
            return self.finish(0)
        channel, ended = self.channel, self.ended
        channel.session.exit(ended)
        self.log("job %s: end, %s %d, %.3f s, %d bytes in, %d out" % (
            self.job.id, "signal" if ended.signalled else "status", ended.number, ended.milliseconds / 1000,
            channel.received_total, channel.sent_total))
        self.tell("over")
        channel.flush()
        # The slot is free already; a submitter that is slow, or asleep, still gets all that the job wrote.
        self.loop.call_later(max(self.PATIENCE, 2 * channel.session.timeout), lambda: self.finish(0))

    # -- when something breaks
    def lost(self, words):
        """The submitter has gone or cannot be understood: its job ends."""
        if self.channel.session.phase is ENDED:
            return self.finish(0)
        if self.job and self.pid:
            self.log("job %s: submitter lost: %s; the job ends" % (self.job.id, words))
        elif words.startswith("protocol"):
            self.log("from %s: %s" % (self.peer[0], words))
        self.end_job()

    def give_up(self, words):
        self.loop.watch(self.link.fileno())
        if self.job and self.pid and not self.channel.closed and self.channel.session.phase is RUNNING:
            self.log("job %s: %s; the job ends" % (self.job.id, words))
            self.channel.session.abort(words)
            self.channel.flush()
        self.end_job()

    def end_job(self):
        if self.pid is None:
            return self.finish(1)
        if self.ending:
            return self.ending.kill()
        self.ending = GroupKill(self.loop, self.pid, lambda: self.finish(1), self.reap)
        self.channel.close()
        for fd in list(self.ends):
            self.channel.sinks[fd].close() if fd in self.channel.sinks else None
            os.close(self.ends.pop(fd))
        if self.slave is not None:
            os.close(self.slave)
            self.slave = None

    def finish(self, status):
        self.tell("ended")
        self.channel.close()
        self.loop.stop(status)


class TerminalSource(Source):
    """What a job writes to its terminal.  The handler holds the terminal open, so the end is told: `ending` means that
    what can be read at once is all."""
    ending = False

    def read_into(self, view):
        size = super().read_into(view)
        return 0 if size is None and self.ending else size


class TerminalSink(Sink):
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

    def watch_other_side(self):
        self.loop.watch(self.fd)

    def close(self):
        if not self.done:
            super().close()
            os.close(self.fd)


def is_hung_up(fd):
    """Whether both directions of a socket pair are closed at the other end."""
    poll = select.poll()
    poll.register(fd, 0)
    return any(events & select.POLLHUP for _, events in poll.poll(0))


def become_user(user):
    """Gives up root for good, with all its groups."""
    os.initgroups(user.pw_name, user.pw_gid)
    os.setgid(user.pw_gid)
    os.setuid(user.pw_uid)


def cservice(arguments, settings):
    """cservice APP COMMAND [ARG...]"""
    if len(arguments) < 2:
        raise Failure("key and command wanted", "", "usage: cservice APP COMMAND [ARG...]", EXIT_USAGE)
    if settings.user and os.geteuid() != 0:
        raise Failure("--user", "only root can change user", "", EXIT_USAGE)
    find_command(arguments[1])
    key, warning = load_key(arguments[0], "private")
    for fd in set((0, 1, 2)) - set(open_descriptors(2)):
        park(fd)
    close_strays()
    load_all()
    loop = Loop()
    log = Log(CSERVICE)
    if warning:
        log(warning)
    service = Daemon(loop, key, settings, arguments[1:], log)
    if hasattr(gc, "freeze"):       # PyPy has none
        gc.freeze()     # what is here stays, and a handler that does not look at it shares its memory
    service.ready()
    return loop.run()


def load_all():
    """What handlers would import by themselves: after --user they may not be allowed to read it any more."""
    import pty
    import resource
    return pty, resource


def close_strays():
    """Whatever was inherited beside the standard three is nobody's business here, nor in the jobs."""
    try:
        highest = max(int(name) for name in os.listdir("/dev/fd"))
    except (OSError, ValueError):
        highest = FD_SETSIZE
    if not LINUX and not MACOS:         # there the folder may list the first few only
        highest = max(highest, min(os.sysconf("SC_OPEN_MAX"), 1 << 20))
    os.closerange(3, highest + 1)


# ---------------------------------------------------------------- crat

ALERTS_KEPT = 1 << 16       # alerts of a key remembered, so that none is printed twice; about 10 MB when full
LINES_KEPT = 10000          # lines kept for a reader that is slow: some seconds of a very busy room, at most 5 MB
WRITE_MAX = 4096            # bytes written at once: POSIX's pipes do not mix so many with another writer's
KEY_RATE, KEY_BURST = 4000, 8000        # lines a second for each key, and for all where none is given
STRANGERS_RATE, STRANGERS_BURST = 10, 100       # beside keys: nothing vouches for these, so they must not fill a disk
START_SLACK = 1.0           # seconds by which an alert may be older than this crat: clocks of one network agree so far
WORDS_MAX = 200             # characters of a reason that are shown
RECEIVE_ROUND = 256         # datagrams taken in a row before signals and timers get their turn


class Report(collections.namedtuple(
        "Report", "heard verdict submitter worker key key_id known status job reason seconds")):
    """One line of crat, safe to print.  With --json its fields are:

    time       UNIX time at which it was heard     event      "completed" or "rats out"
    submitter  address                             worker     address, or "?"
    key        name as given, null if unknown      key_id     "0x" and eight hexadecimal digits
    known      whether a given key vouches for it  status     exit status; null unless completed
    job        id, "" if it had none               reason     words, "" if none
    seconds    from the choice of the worker to the end
    """
    __slots__ = ()

    def line(self):
        text = ("%s completed by %s for %s exit code %d" if self.verdict == COMPLETED else "%s rats out %s for %s")
        fields = (self.submitter, self.worker, self.key or "unknown key (%s)" % self.key_id)
        text %= fields + ((self.status,) if self.verdict == COMPLETED else ())
        job, reason = self.job and " job " + self.job, self.reason and ": " + self.reason
        return "%s%s%s, %.3f s" % (text, job, reason, self.seconds)

    def json(self):
        import json
        return json.dumps({
            "time": round(self.heard, 3), "event": "completed" if self.verdict == COMPLETED else "rats out",
            "submitter": self.submitter, "worker": self.worker, "key": self.key, "key_id": self.key_id,
            "known": self.known, "status": self.status if self.verdict == COMPLETED else None, "job": self.job,
            "reason": self.reason, "seconds": self.seconds})


class ReplayWindow:
    """Names seen, at most `limit`.  The oldest is forgotten first, and from then on nothing as old as that is new: so
    no name is new twice, however much came in between."""

    def __init__(self, limit):
        self.limit, self.names, self.ages, self.floor = limit, set(), [], -1

    def add(self, name, clock):
        """Remembers a name that is not in `names`; False if it is older than what was forgotten.  clock is its age."""
        if clock <= self.floor:
            return False
        self.names.add(name)
        heapq.heappush(self.ages, (clock, name))
        if len(self.ages) > self.limit:
            self.floor, oldest = heapq.heappop(self.ages)
            self.names.discard(oldest)
        return True


class AlertHistory:
    """What a reader of alerts keeps of one key (of all unknown ones together, where key is None): so no holder of one
    key can silence the lines of another."""

    def __init__(self, key, rate, burst):
        self.key = key
        self.name = printable(key.name) if key else "unknown keys"
        self.window = ReplayWindow(ALERTS_KEPT)
        self.bucket = TokenBucket(rate, burst)
        self.count = 0


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
            refusal = self._refusal(datagram.key_id, alert, history, now)
            if refusal is None:
                reports.append(Report(
                    now, alert.verdict, alert.submitter if parse_address(alert.submitter) else source,
                    alert.worker if parse_address(alert.worker) else "?", history.name if history.key else None,
                    "0x" + datagram.key_id.hex(), bool(history.key), alert.status, safe_id(alert.job),
                    printable(alert.words)[:WORDS_MAX], alert.milliseconds / 1000))
            elif refusal:
                topic, words = refusal
                notes.append(((topic, history.name), "not shown from %s for %s: %s" % (source, history.name, words)))
        return reports, notes

    def _refusal(self, key_id, alert, history, now):
        """None if this alert is to be printed, () if it is a repetition, else (topic, words) of a note."""
        # The same alert may come again in a datagram with another nonce or sequence, alone or among others.
        name = hashlib.sha256(key_id + encode_alert(alert)).digest()[:16]
        if name in history.window.names:
            return ()
        ahead, by_clock = alert.clock / 1000 - now, bool(history.key and self.max_skew)
        if by_clock and (abs(ahead) > self.max_skew or now + ahead < self.started - START_SLACK):
            return "stale", ("an alert whose clock is %.0f s %s ours: replayed, sent before this crat began, or a clock "
                             "is wrong (see CRAT_MAX_SKEW)" % (abs(ahead), "ahead of" if ahead > 0 else "behind"))
        if not history.bucket.take(now):
            return "rate", "more than %d alerts a second" % history.bucket.rate
        history.count += 1
        if not history.window.add(name, alert.clock if by_clock else history.count):
            return "old", "an alert older than the last %d, which are all that is remembered" % ALERTS_KEPT
        return None


def safe_id(text):
    """A job's id, if it looks like one."""
    return text if text.isascii() and text.replace("-", "").replace(".", "").isalnum() and len(text) <= 64 else ""


class LineWriter:
    """Writes lines to a descriptor at once, from a thread: so a reader that stops reading stops nothing else, and no
    flag of a descriptor that others share is changed.

    on_error(OSError) is called once, in the thread.  put() gives up lines beyond LINES_KEPT.
    """

    def __init__(self, descriptor, on_error):
        import threading
        self.descriptor, self.on_error = descriptor, on_error
        self.lines, self.changed, self.busy, self.failed = collections.deque(), threading.Condition(), False, False
        threading.Thread(target=self._work, daemon=True).start()

    def put(self, line):
        """Whether there was room for it."""
        with self.changed:
            if len(self.lines) >= LINES_KEPT:
                return False
            self.lines.append((line + "\n").encode("utf-8", "backslashreplace"))
            self.changed.notify_all()
        return True

    def _work(self):
        try:
            while True:
                with self.changed:
                    self.busy = False
                    self.changed.notify_all()
                    self.changed.wait_for(lambda: self.lines)
                    data, self.busy = self.lines.popleft(), True
                    while self.lines and len(data) + len(self.lines[0]) <= WRITE_MAX:
                        data += self.lines.popleft()
                while data:
                    try:
                        data = data[os.write(self.descriptor, data):]
                    except BlockingIOError:
                        wait_for(self.descriptor, select.POLLOUT)       # somebody who shares it made it non-blocking
        except OSError as error:
            with self.changed:
                self.failed = True
                self.changed.notify_all()
            self.on_error(error)

    def finish(self, seconds):
        """Waits until all is written, or no longer."""
        with self.changed:
            self.changed.wait_for(lambda: self.failed or not (self.lines or self.busy), seconds)


class Crat:
    """Hears alerts and prints them until it is told to stop."""

    FINISH = 1.0            # seconds that a slow reader of the last lines is given at the end

    def __init__(self, keys, settings):
        self.settings, self.log = settings, Log(CRAT)
        self.names = ", ".join("%s (%s)" % (key.name, key.fingerprint) for key in keys) or "none"
        self.reader = AlertReader(keys, settings.max_skew, time.time())
        self.socket, self.loop = GroupSocket(settings.group, listen=True), Loop()
        self.writer = LineWriter(1, lambda error: self.loop.call_soon_threadsafe(lambda: self.loop.stop(error)))

    def run(self):
        """Returns None when told to stop, or the error of standard output."""
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                self.loop.on_signal_unless_ignored(number, lambda number: self.loop.stop(None))
            self.loop.watch(self.socket.fileno(), read=self._hear)
            self.loop.call_later(REFRESH_EVERY, self._refresh)
            self.log("ready: hears %s, keys: %s" % (self.settings.group, self.names))
            error = self.loop.run()
            if error is None:
                self.writer.finish(self.FINISH)
            return error
        finally:
            self.socket.close()
            self.loop.close()

    def _refresh(self):
        self.socket.refresh()
        self.loop.call_later(REFRESH_EVERY, self._refresh)

    def _hear(self):
        for _ in range(RECEIVE_ROUND):
            heard = self.socket.receive()
            if heard is None:
                break
            data, source, _ = heard
            reports, notes = self.reader.read(data, source[0], time.time())
            for report in reports:
                line = report.json() if self.settings.json else report.line()
                if self.settings.time and not self.settings.json:
                    line = time.strftime("%Y-%m-%dT%H:%M:%S ", time.localtime(report.heard)) + line
                if not self.writer.put(line):
                    notes.append(("full", "standard output is not read: lines lost"))
            for topic, text in notes:
                self.log.note(topic, text)
        self.log.datagrams_lost(self.socket.dropped)


def crat(arguments, settings):
    """crat [APP.pub...]: prints a line for every alert until SIGTERM or SIGINT, then returns 0.

    Up to LINES_KEPT lines wait for a slow reader; what is lost beyond that is said on standard error.  When the reader
    of standard output is gone it ends as a filter does that dies of SIGPIPE, but by its exit status; with any other
    error of standard output it fails.
    """
    try:
        os.fstat(1)
    except OSError as error:
        raise Failure("standard output", reason_of(error), status=EXIT_USAGE) from None
    keys = []
    for path in arguments:
        key, warning = load_key(path)
        keys.append(key)
        if warning:
            say("crat", warning)
    error = Crat(keys, settings).run()
    if error is not None and error.errno != errno.EPIPE:
        raise Failure("standard output", reason_of(error))
    return 0 if error is None else 128 + signal.SIGPIPE


# ---------------------------------------------------------------- cproxy
# A datagram heard on GROUP is sent again to TARGET, the announcements with a port of ours: a "door" on the far side.
# A worker that comes to a door is relayed to the submitter, once its first bytes show that it answers that very
# announcement: so the proxy leads to nothing but submitters that ask for workers.

LISTENERS_MAX = 256             # doors open at once: searches going on; the one silent for longest makes room
LISTENERS_PER_SOURCE = 64       # of these, for one submitting host: a stranger's flood must not close all the others'
LISTENER_SECONDS = 30.0         # a door stays so long after the last announcement: cexec repeats its own every 5 s at most
ACTIVE_PER_LISTENER = 4         # relayed at once for one announcement, as many as cexec shakes hands with; others wait
CONNECTIONS_PER_LISTENER = 64       # connections kept for one announcement, waiting ones included
RELAYS_MAX = 2000           # connections in all, as far as descriptors suffice
DESCRIPTORS_PER_RELAY = 2
PREAMBLE_SECONDS = 10.0        # to say the opening bytes
CONNECT_SECONDS = 5.0       # to reach the submitter
DUPLICATE_SECONDS = 60.0         # a datagram heard again within this time is the same one, come back around a loop
DUPLICATES_MAX = 1 << 15        # datagrams remembered for that; more than SEND_RATE lets through while one goes around
COPIES = {ALERT: 3}         # times that one datagram passes; else once.  cexec repeats alerts, against loss
SEND_RATE, SEND_BURST = 2000, 2000          # datagrams a second in all: about 200 jobs a second
SOURCE_RATE, SOURCE_BURST = 1000, 1000      # from one address
SOURCES_MAX = 1024          # addresses whose rate is remembered
PIECE = 1 << 18             # bytes read at once; smaller ones cost speed
HELD_MAX = 1 << 26          # bytes held for slow readers in all, from which on only small pieces are read:
SMALL_PIECE = 1 << 14       # then RELAYS_MAX relays hold as much again at most
PUMP_ROUNDS = 8             # moves in a row before others get their turn
SWEEP_SECONDS = 1.0


class DuplicateFilter:
    """Which datagrams have passed already, for ECHO_SECONDS; at most ECHOES_MAX."""

    def __init__(self):
        self.passed = collections.OrderedDict()

    def may_pass(self, datagram, now):
        """Whether this datagram may pass (once more), whatever its port; counts it."""
        name = hashlib.sha256(datagram.data[:6] + datagram.data[8:]).digest()[:16]
        while self.passed and (len(self.passed) >= DUPLICATES_MAX or self._oldest() < now - DUPLICATE_SECONDS):
            self.passed.popitem(last=False)
        times, first = self.passed.get(name, (0, now))
        if times >= COPIES.get(datagram.kind, 1):
            return False
        self.passed[name] = times + 1, first
        return True

    def _oldest(self):
        return next(iter(self.passed.values()))[1]


class Buffer:
    """Room for one read, shared by all relays, and the count of the bytes that they hold for slow readers."""

    def __init__(self):
        self.room, self.held = memoryview(bytearray(PIECE)), 0

    def place(self):
        return self.room if self.held < HELD_MAX else self.room[:SMALL_PIECE]


class Pump:
    """One direction of a relay: bytes that came from `source` go to `sink`, at most PIECE of them held in between.

    They are copied: splicing them through a pipe is no faster here, and needs three times the descriptors.
    Raises OSError when a side is broken.
    """
    __slots__ = ("source", "sink", "buffer", "pending", "moved", "ended", "over")

    def __init__(self, source, sink, buffer, pending=b""):
        self.source, self.sink, self.buffer, self.pending = source, sink, buffer, memoryview(pending)
        self.moved, self.ended, self.over = 0, False, False
        buffer.held += len(pending)

    @property
    def full(self):
        """Whether it waits for the sink; else it waits for the source."""
        return bool(self.pending)

    def pump(self):
        """Moves what can be moved now."""
        for _ in range(0 if self.over else PUMP_ROUNDS):
            try:
                self._drain()
                if self.ended:
                    self.over = True
                    return self.sink.shutdown(socket.SHUT_WR)
                self._fill()
            except BlockingIOError:
                return None
        return None

    def _drain(self):
        """All that is held to the sink; BlockingIOError when it takes no more."""
        while self.pending:
            self._sent(self.sink.send(self.pending))

    def _sent(self, count):
        self.pending, self.moved, self.buffer.held = self.pending[count:], self.moved + count, self.buffer.held - count

    def _fill(self):
        """Bytes from the source, on to the sink as far as it takes them; BlockingIOError when there are none yet."""
        place = self.buffer.place()
        size = self.source.recv_into(place)
        self.ended = not size
        try:
            sent = self.sink.send(place[:size]) if size else 0
        except BlockingIOError:
            sent = 0
        self.moved += sent
        self.pending = memoryview(bytes(place[sent:size]))
        self.buffer.held += size - sent

    def close(self):
        """Gives up what is held.  May be called again."""
        self.buffer.held -= len(self.pending)
        self.pending = memoryview(b"")


class ProxyListener:
    """The port on the far side that stands for one announcement's port."""

    def __init__(self, name, target, nonce, listening):
        self.name, self.target, self.nonce, self.listening = name, target, nonce, listening
        self.port, self.heard = listening.getsockname()[1], 0.0
        self.callers, self.waiting, self.active = set(), collections.deque(), set()


class ProxyRelay:
    """One worker's connection, from its knock at a door to its end.  Its states:

    knocking    the worker has yet to say that it answers this announcement
    waiting     enough others are active for this announcement
    connecting  to the submitter
    running     bytes pass
    over
    """

    def __init__(self, proxy, number, listener, worker, address):
        self.proxy, self.loop, self.number, self.listener, self.worker = proxy, proxy.loop, number, listener, worker
        self.name, self.submitter, self.pumps, self.opening = place_text(address), None, (), b""
        self.state, self.since, self.deadline = "knocking", time.monotonic(), time.monotonic() + PREAMBLE_SECONDS
        worker.setblocking(False)
        keep_alive(worker)
        self.loop.watch(worker.fileno(), read=self._read_preamble)

    def _read_preamble(self):
        """Reads the worker's opening.  Its tag is the submitter's to judge; the nonce is in clear."""
        try:
            data = self.worker.recv(PREAMBLE_SIZE - len(self.opening))
        except BlockingIOError:
            return
        except OSError as error:
            return self.end(reason_of(error))
        self.opening += data
        expected = MAGIC + bytes([WIRE_VERSION]) + self.listener.nonce
        if not data or self.opening[:len(expected)] != expected[:len(self.opening)]:
            return self.end("not an answer to this announcement")
        if len(self.opening) == PREAMBLE_SIZE:
            # From here on the worker says nothing before the submitter does: only its end can come.
            self.state, self.deadline = "waiting", None
            self.loop.watch(self.worker.fileno(), read=self._gone)
            self.proxy.preamble_read(self)

    def _gone(self):
        self.end("the worker has gone")

    def connect(self):
        """It is this one's turn."""
        self.state, self.deadline = "connecting", time.monotonic() + CONNECT_SECONDS
        self.loop.watch(self.worker.fileno())
        family = socket.AF_INET6 if ":" in self.listener.target[0] else socket.AF_INET
        try:
            self.submitter = socket.socket(family, socket.SOCK_STREAM)
            self.submitter.setblocking(False)
            keep_alive(self.submitter)
            error = self.submitter.connect_ex(self.listener.target)
        except OSError as problem:
            return self.end(reason_of(problem))
        if error not in (0, errno.EINPROGRESS):
            return self.end(os.strerror(error))
        self.loop.watch(self.submitter.fileno(), write=self._connected)

    def _connected(self):
        error = self.submitter.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            return self.end("the submitter: " + os.strerror(error))
        self.state, self.deadline = "running", time.monotonic() + self.proxy.idle
        self.pumps = (Pump(self.worker, self.submitter, self.proxy.buffer, self.opening),
                      Pump(self.submitter, self.worker, self.proxy.buffer))
        self.proxy.log("relay %d: %s to %s" % (self.number, self.name, place_text(self.listener.target)))
        self._pump_up()

    def _pump_up(self):
        self._pump(self.pumps[0])

    def _pump_down(self):
        self._pump(self.pumps[1])

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
            # The submitter has done with this one: a worker that does not notice must not keep others waiting.
            self.proxy.released(self)
        watch = self.loop.watch
        watch(self.worker.fileno(), None if up.over or up.full else self._pump_up,
              self._pump_down if down.full else None)
        watch(self.submitter.fileno(), None if down.over or down.full else self._pump_down,
              self._pump_up if up.full else None)

    def _broken(self, pump, error):
        """One direction is broken.  What the other has in hand came before that, and still goes where it can."""
        other = self.pumps[self.pumps[0] is pump]
        try:
            other.pump()
        except OSError:
            pass
        if other.ended:
            # The side that refuses has ended its own direction before: it closed, as programs do that are done.
            return self.end(None if pump.ended else "closed while bytes were on their way")
        self.end(reason_of(error))

    def end(self, why=None):
        """Ends it: after both ends of data quietly, else with a reset to both sides and the reason in the log."""
        if self.state == "over":
            return
        ran, self.state = self.state in ("running", "connecting"), "over"
        for side in filter(None, (self.worker, self.submitter)):
            self.loop.watch(side.fileno())
            close_socket(side, reset=why is not None)
        for pump in self.pumps:
            pump.close()
        if ran:
            up, down = [pump.moved for pump in self.pumps] or (0, 0)
            self.proxy.log("relay %d: %s, %d bytes to the submitter, %d to the worker, %.3f s" % (
                self.number, why or "ended", up, down, time.monotonic() - self.since))
        self.proxy.over(self)


def keep_alive(connection):
    try:
        tune(connection)
    except OSError:
        pass        # it has been reset already: reading will tell


def close_socket(connection, reset=False):
    """Closes it; with a reset, so that the other side cannot mistake this for an end of data."""
    try:
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("@ii", 1, 0))
    except OSError:
        pass
    connection.close()


def place_text(address):
    """A socket address as text."""
    return ("[%s]:%d" if ":" in address[0] else "%s:%d") % address[:2]


class Cproxy:
    """Carries what is heard on one group over to another, and the connections that come back."""

    def __init__(self, source, target, settings):
        self.source, self.target, self.idle, self.notes = source, target, settings.idle, Log(CPROXY)
        self.inside, self.outside = GroupSocket(settings.group, listen=True), GroupSocket(target, False, source)
        self.own = self.outside.socket.getsockname()[:2]
        self.duplicates, self.rate, self.rates = DuplicateFilter(), TokenBucket(SEND_RATE, SEND_BURST), collections.OrderedDict()
        self.listeners, self.relays, self.count, self.draining = collections.OrderedDict(), set(), 0, False
        self.most, self.full = raise_descriptor_limit(), False
        self.buffer, self.spare = Buffer(), os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self.loop = Loop()

    def run(self, group):
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                self.loop.on_signal_unless_ignored(number, self._drain)
            self.loop.watch(self.inside.fileno(), read=self._hear)
            self.loop.call_later(REFRESH_EVERY, self._refresh)
            self.loop.call_later(SWEEP_SECONDS, self._sweep)
            self.log("ready: hears %s, tells %s from %s" % (group, self.target, self.source[0]))
            self.loop.run()
        finally:
            self._close()
        return 0

    def log(self, text):
        self.notes(text)

    def _drain(self, number):
        """The first signal lets what is running end, the second does not."""
        if self.draining or not any(relay.state in ("connecting", "running") for relay in self.relays):
            return self.loop.stop()
        self.draining = True
        self.loop.watch(self.inside.fileno())
        for name in list(self.listeners):
            self._close_listener(name)
        self.log("stopping: waits for %d relays" % len(self.relays))

    def _close(self):
        self.draining = False       # nothing more to wait for
        for name in list(self.listeners):
            self._close_listener(name)
        for relay in list(self.relays):
            relay.end("cproxy was stopped")
        self.inside.close()
        self.outside.close()
        self.loop.close()
        if self.spare is not None:
            os.close(self.spare)

    # -- datagrams
    def _hear(self):
        for _ in range(RECEIVE_ROUND):
            heard = self.inside.receive()
            if heard is None:
                break
            self._datagram(*heard)
        self.notes.datagrams_lost(self.inside.dropped)

    def _datagram(self, data, source, index):
        try:
            datagram = parse_datagram(data)
        except ProtocolError:
            return
        if source[:2] == self.own or index and index == self._far_link():
            return          # it is on the far side already
        now = time.monotonic()
        if datagram.kind == ANNOUNCE and datagram.port < 1024:
            return          # no worker would connect to that
        if not self._allowed(source[0], now):
            return self.notes.note("rate", "too many datagrams from %s: some not carried on" % source[0])
        if not self.duplicates.may_pass(datagram, now):
            return
        if datagram.kind == ANNOUNCE:
            listener = self._listener_for(datagram, source, now)
            data = listener and with_port(data, listener.port)
        elif datagram.kind == TAKEN:
            self._taken(datagram, source)
        problems = self.outside.send(data) if data else ()
        if problems:
            self.notes.note("send", "cannot send to %s: %s" % (self.target, ", ".join(problems)))

    def _far_link(self):
        """The number of the link that TARGET covers; 0 where it is not one link that can be told from the near side."""
        far = self.outside.home
        if far is None or far.loopback:
            return 0
        return far.index if self.target.kind != "unicast" or self.target.address == far.broadcast else 0

    def _allowed(self, source, now):
        rate = self.rates.pop(source, None) or TokenBucket(SOURCE_RATE, SOURCE_BURST)
        self.rates[source] = rate
        if len(self.rates) > SOURCES_MAX:
            self.rates.popitem(last=False)
        return rate.take(now) and self.rate.take(now)

    # -- doors
    def _listener_for(self, datagram, source, now):
        """The door for this announcement, opened if need be; None when none can be had."""
        name = (source[0], source[3:], datagram.key_id, datagram.nonce, datagram.port)
        listener = self.listeners.pop(name, None) or self._open_listener(name, datagram, source)
        if listener:
            self.listeners[name], listener.heard = listener, now
        return listener

    def _open_listener(self, name, datagram, source):
        same = [other for other in self.listeners if other[0] == name[0]]
        if len(same) >= LISTENERS_PER_SOURCE:
            self._close_listener(same[0])
        elif len(self.listeners) >= LISTENERS_MAX:
            self._close_listener(next(iter(self.listeners)))
        address, family, scope = self.source
        try:
            listening = listen_at(socket_address(family, address, 0, scope), family, backlog=CONNECTIONS_PER_LISTENER)
        except (Failure, OSError) as problem:
            return self.notes.note("door", "cannot carry on an announcement of %s: %s" % (source[0], problem))
        listener = ProxyListener(name, (source[0], datagram.port, *source[2:]), datagram.nonce, listening)
        self._watch_listener(listener)
        return listener

    def _watch_listener(self, listener):
        self.loop.watch(listener.listening.fileno(), read=None if self.full else lambda: self._accept(listener))

    def _close_listener(self, name):
        """Whoever has not got through by now gets a reset."""
        listener = self.listeners.pop(name)
        self.loop.watch(listener.listening.fileno())
        listener.listening.close()
        for relay in list(listener.callers):
            if relay.state in ("knocking", "waiting"):
                relay.end("not needed")

    def _taken(self, datagram, source):
        """The submitter has its worker.  Only what comes from where the announcement came from is believed."""
        for name in [name for name in self.listeners
                     if name[:2] == (source[0], source[3:]) and name[2:4] == (datagram.key_id, datagram.nonce)]:
            self._close_listener(name)

    # -- connections
    def _accept(self, listener):
        try:
            worker, address = listener.listening.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._turn_away(listener)
            return
        if len(listener.callers) >= CONNECTIONS_PER_LISTENER:
            return close_socket(worker, reset=True)
        self.count += 1
        relay = ProxyRelay(self, self.count, listener, worker, address)
        self.relays.add(relay)
        listener.callers.add(relay)
        self._set_full(len(self.relays) >= self.most)

    def _turn_away(self, listener):
        """No descriptor is left.  The spare one serves to close the connection, which would else wake us for ever."""
        self.notes.note("descriptors", "out of descriptors: workers turned away")
        if self.spare is not None:
            os.close(self.spare)
            self.spare = None
        try:
            close_socket(listener.listening.accept()[0], reset=True)
        except OSError:
            pass
        try:
            self.spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            pass        # the next connection that ends gives one back

    def _set_full(self, full):
        """With as many connections as can be had, the others wait at the doors, in the kernel."""
        if full != self.full:
            self.full = full
            for listener in self.listeners.values():
                self._watch_listener(listener)

    def preamble_read(self, relay):
        relay.listener.waiting.append(relay)
        self._next(relay.listener)

    def _next(self, listener):
        while listener.waiting and len(listener.active) < ACTIVE_PER_LISTENER:
            relay = listener.waiting.popleft()
            if relay.state == "waiting":
                listener.active.add(relay)
                relay.connect()

    def released(self, relay):
        """The submitter has its hand free for another worker."""
        relay.listener.active.discard(relay)
        self._next(relay.listener)

    def over(self, relay):
        """Called once by every relay at its end."""
        self.relays.discard(relay)
        relay.listener.callers.discard(relay)
        self.released(relay)
        self._set_full(len(self.relays) >= self.most)
        if self.draining and not self.relays:
            self.loop.stop()

    # -- time
    def _refresh(self):
        self.inside.refresh()
        self.outside.refresh()
        self.loop.call_later(REFRESH_EVERY, self._refresh)

    def _sweep(self):
        now = time.monotonic()
        words = {"knocking": "silent", "connecting": "the submitter cannot be reached", "running": "idle"}
        for relay in [relay for relay in self.relays if relay.deadline and relay.deadline < now]:
            relay.end(words.get(relay.state, "too late"))
        for name in [name for name, listener in self.listeners.items() if listener.heard < now - LISTENER_SECONDS]:
            self._close_listener(name)
        self.loop.call_later(SWEEP_SECONDS, self._sweep)


def raise_descriptor_limit():
    """How many relays this process can carry, after its limit of descriptors was raised as far as it may be."""
    import resource
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = RELAYS_MAX * DESCRIPTORS_PER_RELAY + LISTENERS_MAX + 64
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        except (ValueError, OSError):
            soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    room = RELAYS_MAX if soft == resource.RLIM_INFINITY else (soft - LISTENERS_MAX - 64) // DESCRIPTORS_PER_RELAY
    return max(8, min(RELAYS_MAX, room))


def cproxy(arguments, settings):
    """cproxy SELF [TARGET]: carries announcements and alerts from GROUP to TARGET, sent from this host's address SELF,
    and the workers' connections back, until SIGTERM or SIGINT; then returns 0 when the last relay has ended."""
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
    return Cproxy(source, target, settings).run(settings.group)


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
    key, warning, mode, me = parse_key(text, path), None, stat.S_IMODE(status.st_mode), os.geteuid()
    if mode & 0o077:
        warning = "warning: others can use the key %s (mode %04o); to stop that: chmod 600 %s" % (path, mode, path)
    elif me and status.st_uid not in (0, me):
        warning = "warning: the key %s belongs to another user, who can use it" % path
    return text, key, warning


def load_key(path, want=None):
    """(Key, warning or None) from the file PATH, or PATH.pub unless want is "private"; the first usable one counts.

    WANT is "private", "public" or None for either half. Failure: why PATH itself (or, where it is missing, PATH.pub)
    is of no use. The warning is for a file that others can use.
    """
    refusal = None
    for name in [path] if want == "private" else [path, path + ".pub"]:
        try:
            _, key, warning = read_key(name) or (None, None, None)
            if key and want == "private" and not key.private:
                raise Failure("%s is a public half" % name, "serving needs the private key", status=EXIT_USAGE)
            if key and want == "public" and key.private:
                raise Failure("%s is a private half" % name, "submitting needs the public one",
                              "make it with: ckeygen %s" % name, EXIT_USAGE)
        except Failure as problem:
            refusal = refusal or problem
        else:
            if key:
                key.name = path
                return key, warning
    raise refusal or Failure("no key %s" % path, "there is no such file",
                             "make one with ckeygen, or copy it from where it was made", EXIT_USAGE)


def ckeygen(arguments, settings):
    """Makes the key APP, unless it is there, and its public half; with -l tells what each FILE is. Returns the status,
    or raises Failure with one of those above."""
    options, names = set(), list(arguments)
    while names and names[0].startswith("-"):
        option = names.pop(0)
        if option == "--":
            break
        if option not in ("-stdin", "--stdin", "-l"):
            raise Failure("unknown option %s" % option, hint=CKEYGEN_USAGE, status=EXIT_USAGE)
        options.add(option.lstrip("-"))
    if options == {"l"} and names:
        return list_keys(names)
    if "l" in options or len(names) not in (1, 2) or not all(names):
        raise Failure("one or two file names are needed", hint=CKEYGEN_USAGE, status=EXIT_USAGE)
    private_path, public_path = (names + [names[0] + ".pub"])[:2]
    if os.path.realpath(private_path) == os.path.realpath(public_path):
        raise Failure("APP and APP.pub are the same file", private_path, status=EXIT_USAGE)
    found = existing_private(private_path)
    if not found and private_path.endswith(".pub"):
        raise Failure(private_path, "that is the name of a public half, and this would be the private one",
                      "say: ckeygen %s" % private_path[:-4], EXIT_USAGE)
    replaced = replaced_public(public_path)
    private = found
    if "stdin" in options:
        private = make_keypair(master_from_pieces(standard_input()))[0]
    elif not found:
        private = make_keypair(os.urandom(32))[0]
    if found not in (None, private):
        raise Failure("%s exists and is another key" % private_path, "the text given does not lead to it",
                      "it was left as it is; choose another name", EXIT_OTHER_KEY)
    if not (found or replaced in (None, public_half(private)) or os.path.lexists(private_path)):
        raise Failure("cannot replace %s" % public_path, "it is the public half of another key, perhaps the only copy",
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
            key, warning = load_key(path)
            problem, hint = warning, ""
            half = "private" if key.private else "public "
            status = print_out("%s %s %s\n" % (key.fingerprint, half, printable(key.path))) or status
        except Failure as failure:
            problem, hint, status = str(failure), failure.hint, status or failure.status
        for prefix, text in ("ckeygen", problem), ("", hint and "  " + hint):
            if text:
                say(prefix, text)
    return status


def standard_input():
    """The bytes of standard input, piece by piece."""
    if sys.stdin is None:
        raise Failure("cannot read the text", "standard input is closed")
    if os.isatty(0):
        say("ckeygen", "type the text, every character of it counts; end it with Enter and Ctrl-D")
    try:
        while True:
            piece = os.read(0, 1 << 18)
            if not piece:
                return
            yield piece
    except OSError as problem:
        raise Failure("cannot read the text", reason_of(problem)) from None


def existing_private(path):
    """The bytes of the private half in PATH, or None where there is no file; else Failure 101."""
    try:
        text, key, warning = read_key(path) or (None, None, None)
        if key and not key.private:
            raise Failure("", "it is a public half", status=EXIT_USAGE)
    except Failure as problem:
        raise Failure("cannot use %s as a private key" % path, problem.why, "it was left as it is; choose another name",
                      EXIT_TEMPORARY if problem.status == EXIT_TEMPORARY else EXIT_BAD_PRIVATE) from None
    if warning:
        say("ckeygen", warning)
    return text


def replaced_public(path):
    """The public half that is in PATH, or None where there is no file; Failure 102 where there is something else."""
    try:
        text, key, _ = read_key(path) or (None, None, None)
        if key and key.private:
            raise Failure("", "it is a private half", status=EXIT_USAGE)
        return text
    except Failure as problem:
        raise Failure("cannot replace %s" % path, problem.why, "it was left as it is; choose another name, or move it",
                      EXIT_TEMPORARY if problem.status == EXIT_TEMPORARY else EXIT_NO_PUBLIC) from None


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


# ---------------------------------------------------------------- demo

DEMO_TEXT = b"one job, the best machine in the room, and every byte of it comes back\n"


class Demo:
    """Two workers, a crat and one job on the loopback network, in a temporary folder that goes with the demo."""
    PATIENCE = 30.0         # seconds until a tool must be ready

    def __init__(self, command):
        import subprocess
        import tempfile
        import threading
        self.threading = threading
        self.subprocess, self.command, self.running, self.readers = subprocess, command, [], []
        self.folder = tempfile.mkdtemp(prefix="cexec-demo-")
        self.environment = {name: value for name, value in os.environ.items()
                            if not any(name in setting.names for setting in SETTINGS)}
        self.environment["GROUP"] = self.group()

    def group(self):
        """A loopback address that several processes hear, on a port that nobody else has."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        return ("127.255.255.255:%d" if LINUX else "lo0:224.0.1.87:%d") % port

    def tell(self, text):
        say("demo", text)

    def run(self):
        text = " ".join(self.command)
        self.tell("$ export GROUP=%s      # only here: keeps the demo on this machine" % self.environment["GROUP"])
        self.tell("$ ckeygen app app.pub")
        for name, half in zip(("app", "app.pub"), make_keypair(os.urandom(32))):
            path = os.path.join(self.folder, name)
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(half)
        for number in (1, 2):
            self.tell("$ cservice app %s      # worker %d" % (text, number))
            self.start("worker %d" % number, CSERVICE, *self.command)
        self.tell("$ crat app.pub      # the log")
        self.start("crat", CRAT)
        self.tell("$ cexec app.pub < input      # the job")
        status = self.job()
        self.tell("the job's exit status: %d" % status)
        return status

    def arguments(self, tool, *arguments):
        key = os.path.join(self.folder, "app") if tool == CSERVICE else "app.pub"
        return [sys.executable, os.path.abspath(__file__), tool, key] + list(arguments)

    def place(self, tool):
        """The command is looked for where the user stands; the other tools stand beside the keys."""
        return None if tool == CSERVICE else self.folder

    def start(self, name, tool, *arguments):
        """Starts a tool, shows what it says, and waits until it is ready."""
        process = self.subprocess.Popen(
            self.arguments(tool, *arguments), env=self.environment, stdin=self.subprocess.DEVNULL, cwd=self.place(tool),
            stdout=self.subprocess.PIPE, stderr=self.subprocess.STDOUT)
        ready = self.threading.Event()
        self.running.append(process)
        reader = self.threading.Thread(target=self.show, args=(name, process.stdout, ready), daemon=True)
        self.readers.append(reader)
        reader.start()
        if not ready.wait(self.PATIENCE) or process.poll() is not None:
            raise Failure("demo", "%s did not get ready" % name, "what it said is above")

    def show(self, name, lines, ready):
        for line in lines:
            self.tell("%s: %s" % (name, line.decode("utf-8", "replace").rstrip()))
            if b"ready" in line:
                ready.set()
        ready.set()

    def job(self):
        process = self.subprocess.Popen(self.arguments(CEXEC), env=self.environment, stdin=self.input(),
                                        cwd=self.place(CEXEC))
        self.running.append(process)
        status = process.wait()
        return status if status >= 0 else 128 - status

    def input(self):
        """Standard input if something is there to be read, else the text."""
        if 0 in open_descriptors(0) and not os.isatty(0):
            return 0
        reading, writing = os.pipe()
        os.write(writing, DEMO_TEXT)
        os.close(writing)
        return reading

    def close(self):
        """Ends what runs, waits for it, and takes the folder away."""
        import shutil
        for process in reversed(self.running):
            if process.poll() is None:
                process.terminate()
        for process in self.running:
            try:
                process.wait(10)
            except self.subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for reader in self.readers:
            reader.join(10)
        shutil.rmtree(self.folder, ignore_errors=True)


def demo(arguments, settings):
    """demo [COMMAND [ARG...]]"""
    command = arguments or ["tr", "a-z", "A-Z"]
    find_command(command[0])
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, end_demo)
    show = Demo(command)
    try:
        return show.run()
    finally:
        show.close()


def end_demo(number, frame):
    signal.signal(number, signal.SIG_IGN)
    raise SystemExit(128 + number)


# ---------------------------------------------------------------- the tools

TOOLS = collections.OrderedDict([
    ("ckeygen", (ckeygen, CKEYGEN_USAGE[7:], """\
Makes the private key APP for the workers and its public half APP.pub for the submitters.
Both are secret.  If APP exists, only APP.pub is made from it.
  -stdin           derive the key from standard input: the same text, the same key
  -l               tell which half each FILE is, and the key's fingerprint
""")),
    (CEXEC, (cexec, "cexec [-t] [OPTION...] APP[.pub] [NAME=VALUE...]", """\
Runs the job that the workers of the key serve on the best of them, as if it were local.
The job finds each VALUE in its environment as PEER_NAME.
""")),
    (CSERVICE, (cservice, "cservice [OPTION...] APP COMMAND [ARG...]", """\
Serves jobs for the key: each runs COMMAND with the submitter's descriptors.  SIGTERM drains.
""")),
    (CRAT, (crat, "crat [OPTION...] [APP.pub...]", """\
Prints one line for every job that was completed and every worker that was ratted out.
""")),
    (CPROXY, (cproxy, "cproxy [OPTION...] SELF [TARGET]", """\
Joins two networks: what is heard on GROUP goes on to TARGET from the address SELF.
""")),
    ("demo", (demo, "demo [COMMAND [ARG...]]", """\
Shows it all on this machine alone: a key, two workers, a log, and one job.
""")),
])

EXAMPLE = """\
Example:
  $ ckeygen app                      then copy app to the workers, app.pub to the submitters
  $ cservice app tr a-z A-Z          on every worker
  $ echo hello | cexec app.pub       on a submitter
  HELLO
"""


def usage(tool):
    _, synopsis, text = TOOLS[tool]
    lines = ["usage: %s" % synopsis, "", text.rstrip("\n")]
    options = [("%s" % flag, words) for flag, (_, _, owner, words) in FLAGS.items() if owner == tool]
    for setting in SETTINGS:
        if tool in setting.tools:
            default = " (%s)" % setting.default if setting.default else ""
            options.append(("%s %s" % (setting.option, setting.argument), setting.help + default))
            options.append(("", "or " + ", ".join(setting.names) + " in the environment"))
    if options:
        lines += ["", "Options:"] + ["  %-31s %s" % option for option in options]
    return "\n".join(lines) + "\n\n" + EXAMPLE


def overview():
    return "usage: cexec.py TOOL [ARGUMENT...], or TOOL by a symbolic link of that name\n\n" + "".join(
        "  %s\n" % synopsis for _, synopsis, _ in TOOLS.values()) + "\ncexec.py TOOL --help tells more\n"


def print_out(text):
    """Help that cannot be printed is a failure with a status of its own."""
    try:
        os.write(1, text.encode())
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
    if tool is None:
        if arguments[:1] in (["-h"], ["--help"]):
            return print_out(overview())
        if arguments[:1] == ["--version"]:
            return print_out("cexec %s\n" % VERSION)
        try:
            os.write(2, overview().encode())
        except OSError:
            pass
        return EXIT_USAGE
    if arguments[:1] in (["-h"], ["--help"]):
        return print_out(usage(tool))
    if arguments[:1] == ["--version"]:
        return print_out("%s (cexec) %s\n" % (tool, VERSION))
    return run_tool(tool, arguments, environment)


def run_tool(tool, arguments, environment):
    """Every error that a user must hear ends up here."""
    settings = None
    try:
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:       # as the head left it
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if tool != CEXEC:
            gc.enable()
        if tool in ("ckeygen", "demo"):
            return TOOLS[tool][0](arguments, None)
        settings, arguments = read_settings(tool, arguments, environment)
        return TOOLS[tool][0](arguments, settings)
    except Failure as failure:
        return report_failure(tool, failure, settings)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except MemoryError:
        return report_failure(tool, Failure("out of memory"), settings)
    except OSError as error:
        return report_failure(tool, Failure("the system refused", reason_of(error)), settings)
    except Exception as error:      # never a status that could be the job's own
        return report_failure(tool, Failure("internal error", "%s: %s" % (type(error).__name__, error)), settings)


def report_failure(tool, failure, settings):
    fd = getattr(settings, "errors_fd", None)
    if fd is None or fd <= settings.max_fd or fd not in open_descriptors(fd):
        fd = 2
    say(tool, str(failure), fd)
    if failure.hint:
        say("", "  " + failure.hint, fd)
    return failure.status


BEGIN_ANEW = """
import _signal, marshal, sys
if _signal.getsignal(_signal.SIGINT) is not _signal.SIG_IGN:
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
_signal.pthread_sigmask(_signal.SIG_UNBLOCK, [_signal.SIGINT])
main = sys.modules["__main__"]
main.anew, main.__file__ = True, sys.argv[2]
with open(int(sys.argv[1]), "rb") as file:
    del sys.argv[:3]
    code = marshal.load(file)
exec(code, main.__dict__)
"""


LEAN = 20 << 20             # bytes that a tool has resident before it has loaded TLS; compiling takes it to 30 MiB


def begin_anew(path, code):
    """Starts this process over with `code`, the module compiled, if it has compiled that itself: the memory it took,
    as much as all the rest, would stay for good and be copied with every fork.  Returns where that cannot be."""
    try:
        if (not is_large() or not os.path.isfile(path) or getattr(sys, "frozen", False) or "PYTHONHOME" in os.environ
                or not os.path.samefile(sys.executable, "/proc/self/exe")):
            return
        import marshal
        import tempfile
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])      # no traceback from Python's own start
        with tempfile.TemporaryFile() as file:
            marshal.dump(code, file)
            file.seek(0)
            os.set_inheritable(file.fileno(), True)
            os.execv(sys.executable, [sys.executable, "-IS", "-c", BEGIN_ANEW, str(file.fileno()),
                                      os.path.abspath(path)] + sys.argv)
    except OSError:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


def is_large():
    """Whether this process has more memory than it needs (Linux)."""
    if not LINUX or "anew" in globals():
        return False
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") > LEAN


if __name__ == "__main__":
    if tool_of(sys.argv)[0] in (CSERVICE, CRAT, CPROXY):
        begin_anew(globals().get("__file__", ""), sys._getframe().f_code)
    try:
        code = main(sys.argv)
    except SystemExit as end:
        code = end.code
    os._exit(code)      # helper threads may sit in a read or write that never ends
