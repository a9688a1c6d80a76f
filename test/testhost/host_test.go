package testhost

import (
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const (
	// A few commands. Emulation is slow, and the machine may be busy.
	commandPatience = 5 * time.Minute
	// A package's tests, or a scenario with guests of its own: a minute where the machine has nothing else to do.
	testsPatience = 12 * time.Minute
)

// environment is what makes test programs do without Go and prefer KVM.
const environment = "SANDBOXD_TEST_ACCEL=kvm SANDBOXD_TEST_PROGRAMS=/data/bin"

// TestHost boots the host once, for boots are what takes long, and shows there what the machine at hand can't.
func TestHost(t *testing.T) {
	files := map[string]string{
		"busybox.tar":      filepath.Join(repository(t), ".cache/images/busybox.tar"),
		"apparmor.profile": filepath.Join(repository(t), "pkg/runtime/container/apparmor.profile"),
	}
	for _, pkg := range []string{
		"./cmd/sandboxd", "./cmd/sandboxctl", "./cmd/sandbox-agent", "./cmd/sandbox-vsock",
		"./pkg/runtime/microvm/testdata/rogue", "./pkg/runtime/microvm/testdata/jailbreak", "./pkg/runtime/microvm/testdata/vsockguest",
	} {
		files["bin/"+filepath.Base(pkg)] = Build(t, pkg)
	}
	for _, pkg := range []string{"./pkg/runtime/microvm", "./pkg/runtime/container", "./pkg/cgroup"} {
		files["src/"+pkg+"/"+filepath.Base(pkg)+".test"] = BuildTest(t, pkg)
	}
	for _, plugin := range []string{"bridge", "host-local"} { // of Debian's containernetworking-plugins
		files["cni/"+plugin] = filepath.Join("/usr/lib/cni", plugin)
	}
	h := Boot(t, files)

	t.Run("is what the others need", func(t *testing.T) {
		out := h.Must(t, commandPatience, `
			systemctl is-system-running --wait
			stat -f -c %T /sys/fs/cgroup
			modprobe -a kvm_amd vhost_vsock
			udevadm settle
			cat /sys/devices/system/clocksource/clocksource0/current_clocksource
			stat -c %F:%n /dev/kvm /dev/vhost-vsock`)
		want := "running\ncgroup2fs\ntsc\ncharacter special file:/dev/kvm\ncharacter special file:/dev/vhost-vsock\n"
		if out != want {
			t.Fatalf("the host says\n%s\nwant\n%s", out, want)
		}
	})
	t.Run("microVMs under KVM with the kernel's vsock", func(t *testing.T) {
		h.tests(t, "./pkg/runtime/microvm", "TestKernelTransport", "TestLifeOfAVM", "TestJail", "TestClones")
	})
	t.Run("cgroups of version 2", func(t *testing.T) {
		h.tests(t, "./pkg/cgroup", "TestProcessIsInEveryHierarchyFromItsFirstInstruction", "TestMemoryLimitBites",
			"TestPidsLimitBites", "TestDeleteKillsForkersAndIsIdempotent", "TestDaemonIsNeverAProcessOfTheGroup",
			"TestV2OnlyLimits", "TestFreeze", "TestOOMIsCounted", "TestLimitsChangeWhileRunning",
			"TestLessMemoryThanUsedIsRefused", "TestUnenforceableIsRefused", "TestIOLimitBitesAndIsCounted", "TestUsageOfAKnownLoad",
			"TestInnerLimitLeavesTheRest", "TestWeightsShareOneProcessor", "TestMemoryHighSlowsDown", "TestOOMGroupEndsAll")
	})
	t.Run("containers on Linux 6.1", func(t *testing.T) {
		h.tests(t, "./pkg/runtime/container", "TestSandboxStandsAndLeavesNothing", "TestReleaseKeepsTheLayerWithUnshiftedIDs",
			"TestLimitsBite", "TestNextDaemonFindsSandboxes", "TestSpareLayerIsLikeNew", "TestRootsAreMadeAheadOfTime",
			"TestAgentThatCannotBecomeOneSaysWhy")
	})
	t.Run("limits of containers", func(t *testing.T) { testLimits(t, h) })
	t.Run("daemon with both walls", func(t *testing.T) { testDaemon(t, h) })
}

// tests runs tests of a package, each of which must pass: one that skips has shown nothing.
func (h *Host) tests(t *testing.T, pkg string, names ...string) {
	t.Helper()
	began := time.Now()
	out, code := h.Run(t, testsPatience, "cd src/"+pkg+" && "+environment+
		" ./"+filepath.Base(pkg)+".test -test.v -test.run '^("+strings.Join(names, "|")+")$'")
	if code != 0 || strings.Contains(out, "--- SKIP") {
		t.Fatalf("exit code %d, and none may skip\n%s", code, out)
	}
	for _, name := range names {
		if !strings.Contains(out, "--- PASS: "+name+" ") {
			t.Errorf("%s did not pass\n%s", name, out)
		}
	}
	t.Logf("took %v", time.Since(began).Round(100*time.Millisecond))
	for line := range strings.Lines(out) {
		if strings.HasPrefix(line, "---") || strings.Contains(line, "MB/s") || strings.Contains(line, "median") {
			t.Log(strings.TrimSpace(line))
		}
	}
}

// testDaemon is a user's way, on a host as production has it: systemd, cgroup v2, KVM, the kernel's vsock.
func testDaemon(t *testing.T, h *Host) {
	// A call that hangs is ended, and what the daemon is at then is told.
	const ctl = `export PATH=/data/bin:$PATH; set -e
		sandboxctl() {
			timeout --foreground 200 /data/bin/sandboxctl "$@" && return
			local code=$?
			[[ $code != 124 ]] || { systemctl kill --kill-whom=main --signal=QUIT 'sandboxd-*'; sleep 1; }
			[[ $1 == version ]] || { echo "exit code $code of sandboxctl $*"; journalctl --no-pager --lines=400 --unit='sandboxd-*'; }
			return $code
		}
`
	h.Must(t, commandPatience, ctl+`
		start() {
			systemd-run --quiet --unit=$1 --property=Delegate=yes --property=KillMode=process \
				/data/bin/sandboxd --vm-accel kvm --vm-kvm-trial 3m --cni-plugin-dir /data/cni
			for i in $(seq 200); do sandboxctl version >/dev/null 2>&1 && return; sleep 0.1; done
			journalctl --unit=$1; return 1
		}
		declare -f start >/root/start
		start sandboxd-first
		sandboxctl image import --name busybox /data/busybox.tar`)

	boot := strings.TrimSpace(h.Must(t, commandPatience, "cat /proc/sys/kernel/random/boot_id"))
	for _, isolation := range []string{"container", "vm"} {
		got := h.Must(t, testsPatience, ctl+"sandboxctl run --rm --isolation "+isolation+" busybox cat /proc/sys/kernel/random/boot_id")
		if same := strings.TrimSpace(got) == boot; same != (isolation == "container") {
			t.Errorf("%s: boot id %s, the host's is %s", isolation, got, boot)
		}
	}

	// A daemon is killed; the next one reaches both through what it finds.
	h.Must(t, testsPatience, ctl+`
		sandboxctl run -d --name c --isolation container busybox sleep 1000
		sandboxctl run -d --name v --isolation vm busybox sleep 1000`)
	for _, want := range []string{`"accelerator": "kvm"`, `"agentTransport": "vsock"`} {
		got := h.Must(t, commandPatience, ctl+"sandboxctl --format json inspect v")
		if !strings.Contains(strings.Join(strings.Fields(got), " "), want) {
			t.Errorf("inspect lacks %s:\n%s", want, got)
		}
	}
	got := h.Must(t, testsPatience, ctl+`
		systemctl kill --kill-whom=main --signal=KILL sandboxd-first
		. /root/start
		start sandboxd-second
		sandboxctl exec c echo container
		sandboxctl exec v echo vm
		sandboxctl rm -f c v
		sandboxctl ps -a -q`)
	if fields := strings.Fields(got); len(fields) < 2 || fields[0] != "container" || fields[1] != "vm" {
		t.Errorf("after the daemon's death: %q", got)
	}
	testNetwork(t, h, ctl)
	testAppArmor(t, h, ctl)
	if out, _ := h.Run(t, commandPatience, "cat /proc/[0-9]*/comm 2>/dev/null | grep -xE 'qemu-system-x86|sandbox-agent|sandbox-vsock'"); out != "" {
		t.Errorf("left running:\n%s", out)
	}
}

// testAppArmor looks from inside at the profile of containers, under the daemon that runs, and then takes it away.
func testAppArmor(t *testing.T, h *Host, ctl string) {
	// What its capability and the system call filter would let it do, as happens once the profile is gone.
	got := h.Must(t, testsPatience, ctl+`
		sandboxctl run -d --name confined --isolation container --cap-add SYS_ADMIN busybox sh -c '
			cat /proc/self/attr/apparmor/current
			mount -t tmpfs none /tmp
			kill -0 1
			until [ -e /go ]; do sleep 0.1; done
			mount -t tmpfs none /tmp && echo mounted' >/dev/null
		sandboxctl exec confined cat /proc/self/attr/apparmor/current
		sandboxctl inspect --oci confined | grep apparmorProfile
		until [[ $(sandboxctl logs confined 2>&1 | grep -c denied) = 2 ]]; do sleep 0.1; done
		sandboxctl logs confined 2>&1
		apparmor_parser --remove --skip-cache --quiet /data/apparmor.profile
		# A profile that is gone ends a start, and does not weaken it.
		sandboxctl run --rm --isolation container busybox sh -c 'echo un"confined"' 2>&1 || true
		touch /root/go
		sandboxctl cp /root/go confined:/go
		sandboxctl wait confined
		sandboxctl logs confined
		sandboxctl rm confined >/dev/null`)
	for _, want := range []string{
		"sandboxd-container (enforce)\n", `"apparmorProfile": "sandboxd-container"`, "Permission denied", "cannot ask for the AppArmor profile", "mounted\n",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in\n%s", want, got)
		}
	}
	before, _, _ := strings.Cut(got, "cannot ask for")
	if strings.Contains(got, "unconfined") || strings.Contains(before, "mounted") || strings.Count(before, "(enforce)") != 2 {
		t.Errorf("under the profile:\n%s", got)
	}
}

// testNetwork has a VM and a container in one network, each reached from the other. Its plugins take the place of the package's.
func testNetwork(t *testing.T, h *Host, ctl string) {
	t.Helper()
	got := h.Must(t, testsPatience, ctl+`
		mkdir -p /etc/cni/net.d
		cat >/etc/cni/net.d/lan.conflist <<'END'
		{"cniVersion": "1.0.0", "name": "lan", "plugins": [{"type": "bridge", "bridge": "sbx0", "isGateway": true, "mtu": 1400,
		 "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.71.0.0/24"}], [{"subnet": "fd71::/64"}]], "routes": [{"dst": "0.0.0.0/0"}]}}]}
END
		web='mkdir /srv; head -c 1000000 /dev/urandom >/srv/large; md5sum </srv/large >/srv/sum; exec httpd -f -p 80 -h /srv'
		check='until wget -qO /dev/null $0/sum 2>/dev/null; do sleep 1; done; [ "$(wget -qO- $0/large | md5sum)" = "$(wget -qO- $0/sum)" ] && cat /sys/class/net/eth0/mtu'
		address() { sandboxctl --format json inspect $1 | grep -oE "$2"; }
		sandboxctl run -d --name v --isolation vm --network lan busybox sh -c "$web" >/dev/null
		sandboxctl run -d --name c --isolation container --network lan busybox sh -c "$web" >/dev/null
		sandboxctl exec c sh -c "$check" "http://$(address v '10\.71\.0\.[0-9]+' | head -n 1)"
		sandboxctl exec v sh -c "$check" "http://[$(address c 'fd71::[0-9a-f]+' | head -n 1)]"
		sandboxctl rm -f c v >/dev/null
		ip -br link | grep -cE '^(veth|tap)' || true
		find /var/lib/cni/networks/lan -name '*[.:]*[0-9a-f]' ! -name 'last*' | wc -l`)
	if fields := strings.Fields(got); strings.Join(fields, " ") != "1400 1400 0 0" {
		t.Errorf("a VM and a container in one network, MTUs and what is left: %q", got)
	}
}
