// Command draws draws what no two guests may draw alike, and prints a line of each: what it is, and what it came to. Random bytes
// are shown by their sums.
package main

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"io"
	"math/big"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const many = 1 << 20

func main() {
	for _, d := range []struct {
		name string
		draw func() (string, error)
	}{
		{"urandom", urandom},
		{"getrandom", getrandom},
		{"ssh key", sshKey},
		{"tls certificate", tlsCertificate},
		{"uuid", func() (string, error) { return file("/proc/sys/kernel/random/uuid") }},
		{"boot id", func() (string, error) { return file("/proc/sys/kernel/random/boot_id") }},
	} {
		drawn, err := d.draw()
		if err != nil {
			fmt.Fprintf(os.Stderr, "%s: %v\n", d.name, err)
			os.Exit(1)
		}
		fmt.Printf("%s: %s\n", d.name, drawn)
	}
}

func sum(b []byte) string { return fmt.Sprintf("%x", sha256.Sum256(b)) }

func file(path string) (string, error) {
	b, err := os.ReadFile(path)
	return strings.TrimSpace(string(b)), err
}

func urandom() (string, error) {
	f, err := os.Open("/dev/urandom")
	if err != nil {
		return "", err
	}
	defer f.Close()
	b := make([]byte, many)
	_, err = io.ReadFull(f, b)
	return sum(b), err
}

func getrandom() (string, error) {
	b := make([]byte, many)
	for rest := b; len(rest) > 0; {
		n, err := unix.Getrandom(rest, 0)
		if err != nil {
			return "", err
		}
		rest = rest[n:]
	}
	return sum(b), nil
}

// sshKey is the public half of a new key, as OpenSSH writes it: RFC 8709, section 4.
func sshKey() (string, error) {
	public, _, err := ed25519.GenerateKey(rand.Reader)
	var wire []byte
	for _, part := range [][]byte{[]byte("ssh-ed25519"), public} {
		wire = append(binary.BigEndian.AppendUint32(wire, uint32(len(part))), part...)
	}
	return "ssh-ed25519 " + base64.StdEncoding.EncodeToString(wire), err
}

// tlsCertificate is the public key in a certificate of a new key.
func tlsCertificate() (string, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return "", err
	}
	like := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Unix(1<<32, 0), DNSNames: []string{"guest"}}
	der, err := x509.CreateCertificate(rand.Reader, like, like, &key.PublicKey, key)
	if err != nil {
		return "", err
	}
	made, err := x509.ParseCertificate(der)
	if err != nil {
		return "", err
	}
	return sum(made.RawSubjectPublicKeyInfo), nil
}
