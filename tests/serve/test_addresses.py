"""The addresses that a stranger's URL may lead to. Each refused range by its first and last address, or one within."""

from __future__ import annotations

import ipaddress

import pytest

from vz_edge.serve.addresses import REFUSED_IPV4, REFUSED_IPV6, is_public

INSIDE = [
    "169.254.169.254",
    "100.100.100.200",
    "192.0.0.192",
    "168.63.129.16",
    "fd00:ec2::254",
    "fe80::a9fe:a9fe",
    "::",
    "::1",
    "::127.0.0.1",
    "::8.8.8.8",
    "::ffff:0:8.8.8.8",
    "::ffff:0:10.0.0.1",
    "::ffff:10.0.0.1",
    "::ffff:169.254.169.254",
    "64:ff9b::10.0.0.1",
    "64:ff9b::169.254.169.254",
    "64:ff9b:1::",
    "64:ff9b:1::8.8.8.8",
    "64:ff9b:1:ffff::1",
    "100::1",
    "2001::1",
    "2001:0:4136:e378:8000:63bf:3fff:fdd2",
    "2001:2::1",
    "2001:10::1",
    "2001:20::1",
    "2001:db8::1",
    "2002:808:808::1",
    "2002:7f00:1::1",
    "3fff::1",
    "5f00::1",
    "fc00::1",
    "fdff::1",
    "fe80::1",
    "fe80::1%eth0",
    "febf::1",
    "fec0::1",
    "feff::1",
    "ff02::1",
    "4000::1",
    "dead::1",
    "2606:4700::5efe:10.0.0.1",
    "2606:4700::200:5efe:8.8.8.8",
    "0.1.2.3",
    "10.255.255.255",
    "100.127.255.255",
    "127.1.1.1",
    "172.31.255.255",
    "192.0.2.1",
    "192.168.0.1",
    "198.18.0.1",
    "198.19.255.255",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "239.255.255.255",
    "240.0.0.1",
    "255.255.255.255",
]
OUTSIDE = [
    "8.8.8.8",
    "1.1.1.1",
    "9.255.255.255",
    "11.0.0.1",
    "100.63.255.255",
    "100.128.0.1",
    "172.15.255.255",
    "172.32.0.1",
    "169.253.0.1",
    "192.0.1.1",
    "223.255.255.255",
    "2606:4700::1111",
    "2001:4860:4860::8888",
    "2a00:1450::1",
    "::ffff:8.8.8.8",
    "64:ff9b::808:808",
    "2001:200::1",
]


@pytest.mark.parametrize("address", INSIDE)
def test_inside(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", OUTSIDE)
def test_the_open_internet(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("network", [*REFUSED_IPV4, *REFUSED_IPV6])
def test_both_ends_of_a_refused_range(network: ipaddress.IPv4Network | ipaddress.IPv6Network) -> None:
    assert not is_public(network[0]) and not is_public(network[-1])
    if isinstance(network, ipaddress.IPv4Network):
        for written in ("::ffff:0:0", "64:ff9b::"):
            assert not is_public(ipaddress.IPv6Address(int(ipaddress.IPv6Address(written)) | int(network[0])))
