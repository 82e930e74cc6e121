"""Which addresses are the open internet's: a list of our own, whatever a version of Python knows.

Sources are IANA's registries, read in November 2026, and the documents that they name:
https://www.iana.org/assignments/iana-ipv4-special-registry, https://www.iana.org/assignments/iana-ipv6-special-registry,
https://www.iana.org/assignments/ipv6-address-space. The few that the registries call reachable (anycast of protocols,
AS112) serve no pictures, and are refused with the range that they lie in.
"""

from __future__ import annotations

import ipaddress

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

REFUSED_IPV4 = tuple(
    ipaddress.IPv4Network(network)
    for network in (
        "0.0.0.0/8",  # this network (RFC 791)
        "10.0.0.0/8",  # private (RFC 1918)
        "100.64.0.0/10",  # shared, of carriers (RFC 6598); 100.100.100.200 is Alibaba Cloud's metadata
        "127.0.0.0/8",  # loopback (RFC 1122)
        "168.63.129.16/32",  # Azure's host agent (learn.microsoft.com, "What is IP address 168.63.129.16?")
        "169.254.0.0/16",  # link-local (RFC 3927); 169.254.169.254 is most clouds' metadata
        "172.16.0.0/12",  # private (RFC 1918)
        "192.0.0.0/24",  # IETF protocols (RFC 6890); 192.0.0.192 is Oracle Cloud's metadata
        "192.0.2.0/24",  # documentation (RFC 5737)
        "192.31.196.0/24",  # AS112 (RFC 7535)
        "192.52.193.0/24",  # AMT (RFC 7450)
        "192.88.99.0/24",  # relays of 6to4, deprecated (RFC 7526)
        "192.168.0.0/16",  # private (RFC 1918)
        "192.175.48.0/24",  # AS112 (RFC 7534)
        "198.18.0.0/15",  # benchmarks (RFC 2544)
        "198.51.100.0/24",  # documentation (RFC 5737)
        "203.0.113.0/24",  # documentation (RFC 5737)
        "224.0.0.0/4",  # multicast (RFC 5771)
        "240.0.0.0/4",  # reserved (RFC 1112), and broadcast (RFC 919)
    )
)
# All that IANA has given out for the open internet (RFC 4291). Outside of it, and so refused: loopback and unspecified
# (::1, ::), IPv4-compatible ::/96, IPv4-translated ::ffff:0:0:0/96 (RFC 2765), NAT64's local 64:ff9b:1::/48 (RFC 8215),
# discard 100::/64 (RFC 6666), segment routing 5f00::/16 (RFC 9602), unique local fc00::/7 (RFC 4193; fd00:ec2::254 is
# Amazon's metadata), link-local fe80::/10, site-local fec0::/10 (RFC 3879), multicast ff00::/8.
GLOBAL_IPV6 = ipaddress.IPv6Network("2000::/3")
REFUSED_IPV6 = tuple(
    ipaddress.IPv6Network(network)
    for network in (
        "2001::/23",  # IETF protocols (RFC 2928): Teredo 2001::/32, which hides an IPv4 address, ORCHID, benchmarks
        "2001:db8::/32",  # documentation (RFC 3849)
        "2002::/16",  # 6to4, which hides an IPv4 address (RFC 3056), deprecated (RFC 7526)
        "2620:4f:8000::/48",  # AS112 (RFC 7534)
        "3ffe::/16",  # 6bone, given back (RFC 3701)
        "3fff::/20",  # documentation (RFC 9637)
    )
)
# Networks that are another way to write an IPv4 address, which then decides: mapped (RFC 4291), and NAT64 (RFC 6052),
# where a machine that has IPv6 alone finds the open internet's IPv4 part.
WRITING_IPV4 = (ipaddress.IPv6Network("::ffff:0:0/96"), ipaddress.IPv6Network("64:ff9b::/96"))
ISATAP = (0x00005EFE, 0x02005EFE)  # the middle of an address whose end is an IPv4 address (RFC 5214)


def is_public(address: Address) -> bool:
    """Whether an address is one of the open internet, also where it hides an IPv4 address in an IPv6 one."""
    if isinstance(address, ipaddress.IPv4Address):
        return not any(address in network for network in REFUSED_IPV4)
    bare = ipaddress.IPv6Address(int(address))  # without a zone, as in fe80::1%eth0
    if any(bare in network for network in WRITING_IPV4):
        return is_public(ipaddress.IPv4Address(int(bare) & 0xFFFFFFFF))
    if bare not in GLOBAL_IPV6 or any(bare in network for network in REFUSED_IPV6):
        return False
    return (int(bare) >> 32) & 0xFFFFFFFF not in ISATAP
