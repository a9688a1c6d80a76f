#!/usr/bin/python3
"""Has libseccomp compile a profile, to compare our compiler with it.

Reads {"default": errno, "rules": [{"nr": n, "name": s, "errno": null or e, "args": [[index, op, value, second], ...]}]} from
standard input and writes libseccomp's classic BPF to standard output. Needs the package python3-seccomp.
"""
import json
import sys

import seccomp

OPS = {"SCMP_CMP_NE": seccomp.NE, "SCMP_CMP_LT": seccomp.LT, "SCMP_CMP_LE": seccomp.LE, "SCMP_CMP_EQ": seccomp.EQ,
       "SCMP_CMP_GE": seccomp.GE, "SCMP_CMP_GT": seccomp.GT, "SCMP_CMP_MASKED_EQ": seccomp.MASKED_EQ}


def main():
    profile = json.load(sys.stdin)
    f = seccomp.SyscallFilter(seccomp.ERRNO(profile["default"]))
    for r in profile["rules"]:
        try:
            # Our table's number for a name must be libseccomp's, where it knows the name.
            known = seccomp.resolve_syscall(seccomp.Arch(seccomp.Arch.X86_64), r["name"])
        except ValueError:
            known = -1
        if known >= 0 and known != r["nr"]:
            sys.exit("%s is %d here and %d for libseccomp" % (r["name"], r["nr"], known))
        action = seccomp.ALLOW if r["errno"] is None else seccomp.ERRNO(r["errno"])
        args = [seccomp.Arg(i, OPS[op], a, b) for i, op, a, b in r["args"]]
        f.add_rule_exactly(action, r["nr"], *args)
    f.export_bpf(sys.stdout.buffer)


main()
