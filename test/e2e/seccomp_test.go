package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const seccompPolicy = `version: 1
default: vm
rules:
  - name: any-filter
    when: '"filter" in request.labels'
    isolation: container
    seccomp: any
  - name: default-filter
    when: true
    isolation: container
`

// noDirectories refuses what the default profile allows, with an error no other cause has, and allows what that refuses.
const noDirectories = `{"defaultAction": "SCMP_ACT_ALLOW", "archMap": [{"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86"]}],
	"syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 122}]}`

// Another filter than the default one where the rule that matches grants it, and there it is what was asked for.
func TestSeccompAsTheRuleGrants(t *testing.T) {
	d := ownDaemon(t, "--policy", policyFile(t, seccompPolicy))
	d.Watch(t)
	profile := filepath.Join(t.TempDir(), "profile.json")
	must(t, os.WriteFile(profile, []byte(noDirectories), 0o600))
	custom, none := "seccomp="+profile, "seccomp=unconfined"
	const script = "grep -E '^Seccomp:' /proc/self/status; unshare -U true && echo namespace; mkdir /tmp/x && echo directory"
	for _, iso := range isolations {
		w := d.Wall(iso)
		for _, c := range []struct {
			what  string
			flags []string
			out   string
			says  string
		}{
			{"the default", nil, "Seccomp:\t2\ndirectory\n", "unshare"},
			{"a profile", []string{"--label", "filter", "--security-opt", custom}, "Seccomp:\t2\nnamespace\n", "Disk quota exceeded"},
			{"none", []string{"--label", "filter", "--security-opt", none}, "namespace\ndirectory\n", ""},
		} {
			r := w.Run(append(c.flags, busybox, "sh", "-c", script)...).Run()
			// Without a filter of its own a process is as its agent: that one is not filtered either.
			if got := strings.TrimPrefix(r.Stdout, "Seccomp:\t0\n"); got != c.out || !strings.Contains(r.Stderr, c.says) {
				t.Errorf("%s in a %s: exit code %d, stdout %q, stderr %q", c.what, iso, r.Code, r.Stdout, r.Stderr)
			}
		}
		for _, opt := range []string{custom, none} {
			w.Run("--security-opt", opt, busybox, "true").Run().WantError(t, 125, "default-filter", "seccomp: any")
			shared.Wall(iso).Run("--security-opt", opt, busybox, "true").Run().WantError(t, 125, "without a policy")
		}
	}
	if out := d.Call(t, "policy", "explain", "--security-opt", none, busybox).Stdout; !strings.Contains(out, "denied") {
		t.Errorf("policy explain wrote %q", out)
	}
	broken := filepath.Join(t.TempDir(), "broken.json")
	must(t, os.WriteFile(broken, []byte(strings.Replace(noDirectories, "syscalls", "syscals", 1)), 0o600))
	d.Command("create", "--label", "filter", "--security-opt", "seccomp="+broken, busybox, "true").Run().WantError(t, 125, "syscals")
}
