package server

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// TLSFiles are the daemon's certificate and key and the authorities whose certificates callers may show, as PEM files.
// They are read again when they have changed, at the next connection: whoever renews them need not tell the daemon.
type TLSFiles struct {
	cert, key, clientCA string
	log                 *zap.Logger

	mu     sync.Mutex // guards what follows
	loaded *tlsState
	stamps [3]stamp
}

// tlsState is what was loaded; it does not change.
type tlsState struct {
	config *tls.Config
}

// stamp tells whether a file is another than before.
type stamp struct {
	modified time.Time
	size     int64
}

// LoadTLS reads the files.
func LoadTLS(cert, key, clientCA string, log *zap.Logger) (*TLSFiles, error) {
	t := &TLSFiles{cert: cert, key: key, clientCA: clientCA, log: log}
	if err := t.Reload(); err != nil {
		return nil, err
	}
	return t, nil
}

// Reload reads the files now. After an error what was loaded before stays.
func (t *TLSFiles) Reload() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.reloadLocked(t.stampsNow())
}

func (t *TLSFiles) reloadLocked(stamps [3]stamp) error {
	pair, err := tls.LoadX509KeyPair(t.cert, t.key)
	if err != nil {
		return fmt.Errorf("cannot load the certificate of --tls-cert and --tls-key: %w", err)
	}
	pem, err := os.ReadFile(t.clientCA)
	if err != nil {
		return fmt.Errorf("cannot load the authorities of --tls-client-ca: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return fmt.Errorf("cannot load the authorities of --tls-client-ca: %s has no certificate in PEM", t.clientCA)
	}
	t.stamps = stamps
	t.loaded = &tlsState{config: &tls.Config{
		Certificates: []tls.Certificate{pair},
		ClientAuth:   tls.RequireAndVerifyClientCert,
		ClientCAs:    pool,
		MinVersion:   tls.VersionTLS13,
		NextProtos:   []string{"h2"},
		// A resumed session would carry on what an older certificate or authority proved.
		SessionTicketsDisabled: true,
	}}
	return nil
}

func (t *TLSFiles) stampsNow() (stamps [3]stamp) {
	for i, path := range []string{t.cert, t.key, t.clientCA} {
		if info, err := os.Stat(path); err == nil {
			stamps[i] = stamp{info.ModTime(), info.Size()}
		}
	}
	return stamps
}

// current is what is loaded, after a look whether the files have changed. While they are half replaced the old ones hold.
func (t *TLSFiles) current() *tlsState {
	t.mu.Lock()
	defer t.mu.Unlock()
	if now := t.stampsNow(); now != t.stamps {
		if err := t.reloadLocked(now); err != nil {
			t.log.Error("the certificates have changed and cannot be used; those from before stay in use", zap.Error(err))
		}
	}
	return t.loaded
}

// proof is what a client's certificate showed when it connected, and what must go on to be true.
type proof struct {
	files *TLSFiles
	state *tlsState
	certs []*x509.Certificate
}

// holds reports whether the certificate is still good: connections live longer than certificates and authorities.
func (p *proof) holds() bool {
	p.files.mu.Lock()
	state := p.files.loaded
	p.files.mu.Unlock()
	now := time.Now()
	if state == p.state && !slices.ContainsFunc(p.certs, func(c *x509.Certificate) bool { return now.After(c.NotAfter) }) {
		return true
	}
	intermediates := x509.NewCertPool()
	for _, c := range p.certs[1:] {
		intermediates.AddCert(c)
	}
	_, err := p.certs[0].Verify(x509.VerifyOptions{
		Roots: state.config.ClientCAs, Intermediates: intermediates, CurrentTime: now,
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
	return err == nil
}

// callerOfCertificate: whoever holds the key of a certificate has its names, and is no user of this host.
func callerOfCertificate(c *x509.Certificate) (spec.Caller, error) {
	caller := spec.Caller{UID: spec.NoID, GID: spec.NoID}
	add := func(kind, name string) {
		if name != "" {
			caller.Names = append(caller.Names, kind+":"+name)
		}
	}
	add("cn", c.Subject.CommonName)
	for _, n := range c.DNSNames {
		add("dns", n)
	}
	for _, n := range c.EmailAddresses {
		add("email", n)
	}
	for _, n := range c.URIs {
		add("uri", n.String())
	}
	if len(caller.Names) == 0 {
		return caller, errors.New("its certificate has no name")
	}
	slices.Sort(caller.Names)
	return caller, nil
}
