package server

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"go.uber.org/zap/zaptest"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
	"github.com/sandboxd/sandboxd/pkg/access"
	"github.com/sandboxd/sandboxd/pkg/spec"
	"github.com/sandboxd/sandboxd/pkg/workload"
)

// authority signs certificates for tests.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	key := newKey(t)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "authority"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &authority{cert, key}
}

func (a *authority) pem() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw})
}

// issue makes a certificate and its key, both PEM.
func (a *authority) issue(t *testing.T, change func(*x509.Certificate)) (cert, key []byte) {
	t.Helper()
	k := newKey(t)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	change(template)
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, k.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})
}

func (a *authority) server(t *testing.T) (cert, key []byte) {
	return a.issue(t, func(c *x509.Certificate) {
		c.IPAddresses = []net.IP{net.IPv4(127, 0, 0, 1)}
		c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	})
}

func writeFile(t *testing.T, path string, content []byte) {
	t.Helper()
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
}

// tcp is a server that answers over TCP as well.
type tcp struct {
	*harness
	dir, address string
	authority    *authority
}

func serveTCP(t *testing.T, c Config) *tcp {
	t.Helper()
	dir, a := t.TempDir(), newAuthority(t)
	cert, key := a.server(t)
	writeFile(t, filepath.Join(dir, "cert"), cert)
	writeFile(t, filepath.Join(dir, "key"), key)
	writeFile(t, filepath.Join(dir, "ca"), a.pem())
	files, err := LoadTLS(filepath.Join(dir, "cert"), filepath.Join(dir, "key"), filepath.Join(dir, "ca"), zaptest.NewLogger(t))
	if err != nil {
		t.Fatal(err)
	}
	c.TLS = files
	h := serve(t, c)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go h.server.Serve(l) //nolint:errcheck // the harness stops it and sees that it was the server that ended.
	return &tcp{harness: h, dir: dir, address: l.Addr().String(), authority: a}
}

// dial makes a client with a certificate, or without one.
func (s *tcp) dial(t *testing.T, cert, key []byte) sandboxdv1.WorkloadServiceClient {
	t.Helper()
	pool := x509.NewCertPool()
	pool.AddCert(s.authority.cert)
	config := &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}
	if cert != nil {
		pair, err := tls.X509KeyPair(cert, key)
		if err != nil {
			t.Fatal(err)
		}
		config.Certificates = []tls.Certificate{pair}
	}
	return s.dialWith(t, credentials.NewTLS(config))
}

func (s *tcp) dialWith(t *testing.T, creds credentials.TransportCredentials) sandboxdv1.WorkloadServiceClient {
	t.Helper()
	conn, err := grpc.NewClient("dns:///"+s.address, grpc.WithTransportCredentials(creds))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return sandboxdv1.NewWorkloadServiceClient(conn)
}

func list(t *testing.T, c sandboxdv1.WorkloadServiceClient) codes.Code {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	_, err := c.ListWorkloads(ctx, &sandboxdv1.ListWorkloadsRequest{})
	return status.Code(err)
}

func ciCertificate(c *x509.Certificate) {
	c.Subject.CommonName = "runner"
	c.DNSNames = []string{"runner.example"}
	c.URIs = []*url.URL{{Scheme: "spiffe", Host: "example", Path: "/ci"}}
}

const certificateAccess = `version: 1
roles: [{name: ci, may: [view, create], isolation: [auto], images: ["**"]}]
grants: [{certificates: ["uri:spiffe://example/ci"], roles: [ci]}]
`

func certificateHarness(t *testing.T, create func(workload.CreateOptions)) *tcp {
	t.Helper()
	table, err := access.Load([]byte(certificateAccess), "test")
	if err != nil {
		t.Fatal(err)
	}
	return serveTCP(t, Config{Access: table, Images: &noImages{}, Workloads: &fakeWorkloads{
		list: func(workload.Filter, int, string) ([]workload.Workload, string, error) { return nil, "", nil },
		create: func(_ context.Context, o workload.CreateOptions) (workload.Workload, error) {
			create(o)
			return workload.Workload{}, nil
		},
	}})
}

func TestCallerIsWhatItsCertificateSays(t *testing.T) {
	callers := make(chan spec.Caller, 1)
	s := certificateHarness(t, func(o workload.CreateOptions) { callers <- o.Caller })
	cert, key := s.authority.issue(t, ciCertificate)
	if _, err := s.dial(t, cert, key).CreateWorkload(t.Context(), validCreate()); err != nil {
		t.Fatal(err)
	}
	got := receive(t, callers, "the call")
	want := []string{"cn:runner", "dns:runner.example", "uri:spiffe://example/ci"}
	if got.UID != spec.NoID || got.GID != spec.NoID || !slices.Equal(got.Names, want) {
		t.Errorf("caller %+v, want no user and %q", got, want)
	}
}

func TestWithoutGoodCertificateNobodyGetsIn(t *testing.T) {
	s := certificateHarness(t, nil)
	if got := list(t, s.dialWith(t, insecure.NewCredentials())); got != codes.Unavailable {
		t.Errorf("without TLS: %v", got)
	}
	if got := list(t, s.dial(t, nil, nil)); got != codes.Unavailable {
		t.Errorf("without a certificate: %v", got)
	}
	for what, c := range map[string]struct {
		by     *authority
		change func(*x509.Certificate)
		want   codes.Code
	}{
		"good":              {s.authority, ciCertificate, codes.OK},
		"another authority": {newAuthority(t), ciCertificate, codes.Unavailable},
		"expired": {s.authority, func(c *x509.Certificate) {
			ciCertificate(c)
			c.NotAfter = time.Now().Add(-time.Minute)
		}, codes.Unavailable},
		"for servers": {s.authority, func(c *x509.Certificate) {
			ciCertificate(c)
			c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
		}, codes.Unavailable},
		"without a name": {s.authority, func(*x509.Certificate) {}, codes.Unavailable},
		// Known, and without a role.
		"another name": {s.authority, func(c *x509.Certificate) { c.Subject.CommonName = "spiffe://example/ci" }, codes.PermissionDenied},
		// It says root; it is not.
		"root": {s.authority, func(c *x509.Certificate) { c.Subject.CommonName = "root" }, codes.PermissionDenied},
	} {
		cert, key := c.by.issue(t, c.change)
		if got := list(t, s.dial(t, cert, key)); got != c.want {
			t.Errorf("%s: %v, want %v", what, got, c.want)
		}
	}
}

// Who replaces the files need not restart the daemon, and a connection does not outlive the trust it was made with.
func TestCertificatesAreReloaded(t *testing.T) {
	s := certificateHarness(t, nil)
	cert, key := s.authority.issue(t, ciCertificate)
	before := s.dial(t, cert, key)
	if got := list(t, before); got != codes.OK {
		t.Fatalf("at first: %v", got)
	}
	next := newAuthority(t)
	// Half replaced: the old ones hold.
	writeFile(t, filepath.Join(s.dir, "ca"), []byte("no certificate"))
	if got := list(t, s.dial(t, cert, key)); got != codes.OK {
		t.Errorf("with a broken file: %v", got)
	}
	writeFile(t, filepath.Join(s.dir, "ca"), next.pem())
	newCert, newKey := next.issue(t, ciCertificate)
	if got := list(t, s.dial(t, newCert, newKey)); got != codes.OK {
		t.Errorf("of the new authority: %v", got)
	}
	if got := list(t, s.dial(t, cert, key)); got != codes.Unavailable {
		t.Errorf("of the old authority: %v", got)
	}
	if got := list(t, before); got != codes.PermissionDenied {
		t.Errorf("a connection made under the old authority: %v, want denied", got)
	}
}

// A connection ends to be anybody's when its certificate expires.
func TestCertificateExpiresDuringItsConnection(t *testing.T) {
	s := certificateHarness(t, nil)
	var c sandboxdv1.WorkloadServiceClient
	var expires time.Time
	// On a slow machine the first call may come too late for a short life.
	for life := 2 * time.Second; ; life *= 2 {
		if life > patience {
			t.Fatal("no call came in time")
		}
		expires = time.Now().Add(life)
		cert, key := s.authority.issue(t, func(c *x509.Certificate) { ciCertificate(c); c.NotAfter = expires })
		c = s.dial(t, cert, key)
		if list(t, c) == codes.OK {
			break
		}
	}
	for deadline := time.Now().Add(patience); list(t, c) == codes.OK; time.Sleep(100 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the certificate has expired, and its connection may still call")
		}
	}
	if time.Now().Before(expires.Truncate(time.Second)) {
		t.Error("it was refused before it expired")
	}
}

// TestLoadTLSRefuses: what cannot be used is said at the start.
func TestLoadTLSRefuses(t *testing.T) {
	dir, a := t.TempDir(), newAuthority(t)
	cert, key := a.server(t)
	_, otherKey := a.server(t)
	for name, content := range map[string][]byte{"cert": cert, "key": key, "other": otherKey, "ca": a.pem(), "empty": nil} {
		writeFile(t, filepath.Join(dir, name), content)
	}
	for _, c := range [][3]string{{"cert", "other", "ca"}, {"none", "key", "ca"}, {"cert", "key", "none"}, {"cert", "key", "empty"}, {"empty", "key", "ca"}} {
		if _, err := LoadTLS(filepath.Join(dir, c[0]), filepath.Join(dir, c[1]), filepath.Join(dir, c[2]), zaptest.NewLogger(t)); err == nil {
			t.Errorf("%v was loaded", c)
		}
	}
}
