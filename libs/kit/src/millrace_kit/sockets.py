"""Listening sockets for servers that are not gRPC's."""

import socket


def bound_socket(listen: str, *, share_port: bool = False) -> socket.socket:
    """A TCP socket bound to `listen` (`host:port`, port 0 takes a free one).

    Args:
        listen: address.
        share_port: whether other processes bind the same port (SO_REUSEPORT): the kernel spreads connections over them.

    Raises:
        OSError: the address is in use or none of this machine.
    """
    host, _, port = listen.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    family, kind, protocol, _name, address = socket.getaddrinfo(bare, int(port), type=socket.SOCK_STREAM)[0]
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if share_port:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound.bind(address)
    except OSError:
        bound.close()
        raise
    bound.setblocking(False)
    return bound
