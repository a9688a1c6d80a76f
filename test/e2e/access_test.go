package e2e

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sandboxd/sandboxd/test/e2e/harness"
)

// tenant is a user, and a group, that no host has by chance.
const tenant = 61234

const accessFile = `version: 1
roles:
  - {name: operator, everything: true}
  - name: tenant-a
    may: [view, logs, create, control, update, delete, exec, copy]
    workloads: {tenant: a}
    isolation: [container, vm]
    images: ["docker.io/library/busybox:*"]
    max: {memory: 256m}
grants:
  - {users: [root], roles: [operator]}
  - {users: ["%d"], certificates: ["uri:spiffe://example/a"], roles: [tenant-a]}
`

// accessDaemon is a daemon with roles, whose socket the tenant's group may use and that answers over TCP.
func accessDaemon(t *testing.T) (d *harness.Daemon, file string, overTCP []string) {
	t.Helper()
	dir := t.TempDir()
	file = filepath.Join(dir, "access.yaml")
	must(t, os.WriteFile(file, fmt.Appendf(nil, accessFile, tenant), 0o600))
	authority := newAuthority(t)
	authority.issue(t, filepath.Join(dir, "host"), func(c *x509.Certificate) { c.IPAddresses = []net.IP{net.IPv4(127, 0, 0, 1)} })
	authority.issue(t, filepath.Join(dir, "tenant"), func(c *x509.Certificate) {
		c.URIs = []*url.URL{{Scheme: "spiffe", Host: "example", Path: "/a"}}
	})
	must(t, os.WriteFile(filepath.Join(dir, "ca.pem"), authority.pem(), 0o600))
	// A port that was free a moment ago.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	tcp := "tcp://" + l.Addr().String()
	must(t, l.Close())

	d, err = harness.NewDaemon(strings.ReplaceAll(t.Name(), "/", "-"))
	must(t, err)
	d.Args = []string{
		"--access", file, "--socket-group", fmt.Sprint(tenant), "--listen", d.Address + "," + tcp,
		"--tls-cert", filepath.Join(dir, "host.pem"), "--tls-key", filepath.Join(dir, "host.key"), "--tls-client-ca", filepath.Join(dir, "ca.pem"),
	}
	t.Cleanup(func() { must(t, d.Remove()) })
	d.MustStart(t)
	must(t, d.Import(busybox))
	return d, file, []string{
		"SANDBOXD_ADDRESS=" + tcp, "SANDBOXD_TLS_CA=" + filepath.Join(dir, "ca.pem"),
		"SANDBOXD_TLS_CERT=" + filepath.Join(dir, "tenant.pem"), "SANDBOXD_TLS_KEY=" + filepath.Join(dir, "tenant.key"),
	}
}

// Behind either wall a tenant may do with its own workloads what its role says, by its user id as by its certificate;
// others' are not there for it, and whatever is too much is refused with the role's rule.
func TestRoles(t *testing.T) {
	d, file, overTCP := accessDaemon(t)
	for _, iso := range harness.Isolations {
		t.Run(iso, func(t *testing.T) {
			w := d.Wall(iso)
			d.Watch(t)
			foreign := w.Create(t, "--label", "tenant=b", "--name", "foreign-"+iso, busybox, "true")
			as := func(args ...string) *harness.Invocation { return d.Command(args...).As(tenant) }
			remote := func(args ...string) *harness.Invocation {
				i := d.Command(args...)
				i.Env = overTCP
				return i
			}
			r := as("run", "-d", "--isolation", iso, "--memory", "128m", "--label", "tenant=a", "--name", "mine-"+iso, busybox, "sleep", "1000").Run()
			r.Want(t, 0)
			mine := strings.TrimSpace(r.Stdout)
			defer func() { as("rm", "-f", mine).Run().Want(t, 0) }()

			as("exec", mine, "echo", "in").Run().WantOut(t, "in\n")
			remote("exec", mine, "echo", "in").Run().WantOut(t, "in\n")
			as("update", "--cpus", "0.5", mine).Run().Want(t, 0)
			as("pause", mine).Run().Want(t, 0)
			remote("resume", mine).Run().Want(t, 0)
			for what, i := range map[string]*harness.Invocation{"by user": as("ps", "-a", "-q"), "by certificate": remote("ps", "-a", "-q")} {
				if out := i.Run().Stdout; strings.TrimSpace(out) != mine {
					t.Errorf("%s the tenant sees %q, want only %s", what, out, mine)
				}
			}
			if n := strings.Count(d.Call(t, "ps", "-a", "-q").Stdout, "\n"); n != 2 {
				t.Errorf("root sees %d workloads, want 2", n)
			}
			for _, args := range [][]string{{"inspect"}, {"logs"}, {"rm", "-f"}, {"start"}, {"pause"}, {"update", "--pids", "9"}, {"exec"}} {
				for _, ref := range []string{foreign, foreign[:6], "foreign-" + iso} {
					call := append(args[:len(args):len(args)], ref)
					if args[0] == "exec" {
						call = append(call, "true")
					}
					as(call...).Run().WantError(t, 125, "no workload")
				}
			}
			create := func(more ...string) []string {
				return append([]string{"create", "--isolation", iso, "--memory", "128m"}, more...)
			}
			for _, c := range []struct {
				args []string
				rule string
			}{
				{create(busybox, "true"), "tenant=a"},
				{create("--label", "tenant=b", busybox, "true"), "tenant=a"},
				{create("--label", "tenant=a", "--cap-add", "NET_ADMIN", busybox, "true"), "capabilities: CAP_NET_ADMIN"},
				{create("--label", "tenant=a", "--memory", "512m", busybox, "true"), "max.memory"},
				{create("--label", "tenant=a", "--isolation", "auto", busybox, "true"), "isolation: auto"},
				{create("--label", "tenant=a", "--mount", "type=bind,source=/etc,target=/mnt", busybox, "true"), "binds: /etc"},
				{create("--label", "tenant=a", "--log-size", "1g", busybox, "true"), "max.log"},
				{[]string{"update", "--memory", "512m", mine}, "max.memory"},
				// Its default, which is more than 256 MiB.
				{[]string{"update", "--memory", "0", mine}, "max.memory"},
				{[]string{"update", "--cpu-weight", "10000", mine}, "privileges: placement"},
				{[]string{"image", "rm", busybox}, "images-remove"},
				{[]string{"doctor"}, "system-view"},
			} {
				as(c.args...).Run().WantError(t, 125, c.rule)
				remote(c.args...).Run().WantError(t, 125, c.rule)
			}
			checkAudit(t, d, iso, mine, foreign)
		})
	}

	// Who has no role may do nothing, though the socket lets him in.
	stranger := d.Command("ps").As(tenant)
	must(t, os.WriteFile(file, []byte(strings.ReplaceAll(fmt.Sprintf(accessFile, tenant+1), "example/a", "example/b")), 0o600))
	must(t, d.Cmd.Process.Signal(syscall.SIGHUP))
	harness.Eventually(t, harness.CallTimeout, "the access file is read again", func() (bool, string) {
		r := stranger.Run()
		return r.Code != 0 && strings.Contains(r.Stderr, "has no role"), r.Stderr
	})
	gone := d.Command("ps")
	gone.Env = overTCP
	gone.Run().WantError(t, 125, "has no role")
	// What cannot be used changes nothing.
	must(t, os.WriteFile(file, []byte("version: 1\nroles: nonsense\n"), 0o600))
	must(t, d.Cmd.Process.Signal(syscall.SIGHUP))
	harness.Eventually(t, harness.CallTimeout, "the daemon complains", func() (bool, string) {
		return strings.Contains(d.LogTail(), "what was read before holds"), d.LogTail()
	})
	d.Call(t, "ps")
}

// checkAudit looks for what the tenant did and tried, by user and by certificate, in the daemon's audit log.
func checkAudit(t *testing.T, d *harness.Daemon, iso, mine, foreign string) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(d.StateDir, "audit", "audit.log"))
	must(t, err)
	var lines []string
	for line := range strings.Lines(string(b)) {
		if !json.Valid([]byte(line)) {
			t.Errorf("a line of the audit log is no JSON: %s", line)
		}
		lines = append(lines, line)
	}
	user, certificate := fmt.Sprintf(`"transport":"unix","uid":%d,`, tenant), `"transport":"tls","names":["uri:spiffe://example/a"]`
	for _, want := range [][]string{
		{user, "/CreateWorkload", `"workload":"` + mine, `"memory_bytes":134217728`, `"decision":"allowed","rule":"tenant-a"`, `"code":"OK"`},
		{user, "/StartWorkload", `"workload":"` + mine, `"code":"OK"`},
		{user, "/Exec", `"workload":"` + mine, `"command":{"arguments":1,"program":"echo"}`, `"part":"begin"`},
		{certificate, "/Exec", `"workload":"` + mine, `"part":"end"`, `"code":"OK"`},
		{user, "/PauseWorkload", `"workload":"` + mine},
		{certificate, "/ResumeWorkload", `"workload":"` + mine},
		{user, "/CreateWorkload", `"source":"/etc"`, `"decision":"denied","rule":"tenant-a.binds"`, `"code":"PermissionDenied","reason":"FORBIDDEN"`},
		{certificate, "/UpdateWorkload", `"decision":"denied","rule":"tenant-a.max.memory"`},
		{user, "/DeleteWorkload", `"workload":"` + foreign, `"id":"foreign-` + iso + `"`, `"decision":"refused"`, `"code":"NotFound"`},
	} {
		if !slices.ContainsFunc(lines, func(line string) bool {
			return !slices.ContainsFunc(want, func(part string) bool { return !strings.Contains(line, part) })
		}) {
			t.Errorf("no line of the audit log has %q", want)
		}
	}
	if strings.Contains(string(b), "/GetWorkload") {
		t.Error("what only looks is in the audit log")
	}
}

// authority signs the certificates of a test.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "authority"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	must(t, err)
	cert, err := x509.ParseCertificate(der)
	must(t, err)
	return authority{cert, key}
}

func (a authority) pem() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw})
}

// issue writes path.pem and path.key.
func (a authority) issue(t *testing.T, path string, change func(*x509.Certificate)) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(2), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
	change(template)
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, key.Public(), a.key)
	must(t, err)
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	must(t, err)
	must(t, os.WriteFile(path+".pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600))
	must(t, os.WriteFile(path+".key", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}), 0o600))
}
