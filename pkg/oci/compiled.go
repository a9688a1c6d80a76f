package oci

import (
	"crypto/sha256"
	"encoding/binary"
	"hash"
	"sync"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// maxCompiled bounds how many compiled filters are kept: few profiles are in use at a time, but whoever writes a policy may
// have any number.
const maxCompiled = 64

// compiled keeps what was compiled, by everything a compilation looks at. Compiling takes ten times as long as looking.
type compiled struct {
	mu      sync.Mutex
	filters map[[sha256.Size]byte][]byte
}

var kept compiled

// get answers with the filter of a profile, which nobody may change.
func (c *compiled) get(profile *specs.LinuxSeccomp, compile func(*specs.LinuxSeccomp) ([]byte, error)) ([]byte, error) {
	key := fingerprint(profile)
	c.mu.Lock()
	filter, known := c.filters[key]
	c.mu.Unlock()
	if known {
		return filter, nil
	}
	filter, err := compile(profile)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.filters == nil || len(c.filters) >= maxCompiled {
		c.filters = map[[sha256.Size]byte][]byte{}
	}
	c.filters[key] = filter
	return filter, nil
}

// fingerprint is the same for two profiles only if they are equal: each field, in order, with its length before it.
func fingerprint(p *specs.LinuxSeccomp) (key [sha256.Size]byte) {
	const usual = 16 << 10 // the default profile has 8
	f := fingerprinter{Hash: sha256.New(), buf: make([]byte, 0, usual)}
	f.text(string(p.DefaultAction))
	f.optional(p.DefaultErrnoRet)
	f.number(uint64(len(p.Architectures)))
	for _, a := range p.Architectures {
		f.text(string(a))
	}
	f.number(uint64(len(p.Flags)))
	for _, flag := range p.Flags {
		f.text(string(flag))
	}
	f.text(p.ListenerPath)
	f.text(p.ListenerMetadata)
	f.number(uint64(len(p.Syscalls)))
	for _, s := range p.Syscalls {
		f.number(uint64(len(s.Names)))
		for _, name := range s.Names {
			f.text(name)
		}
		f.text(string(s.Action))
		f.optional(s.ErrnoRet)
		f.number(uint64(len(s.Args)))
		for _, a := range s.Args {
			f.number(uint64(a.Index))
			f.number(a.Value)
			f.number(a.ValueTwo)
			f.text(string(a.Op))
		}
	}
	f.flush()
	f.Sum(key[:0])
	return key
}

// fingerprinter gathers before it hashes: names are short.
type fingerprinter struct {
	hash.Hash
	buf []byte
}

func (f *fingerprinter) number(n uint64) { f.buf = binary.LittleEndian.AppendUint64(f.buf, n) }

func (f *fingerprinter) text(s string) {
	f.number(uint64(len(s)))
	f.buf = append(f.buf, s...)
}

func (f *fingerprinter) optional(n *uint) {
	if n == nil {
		f.number(0)
		return
	}
	f.number(1)
	f.number(uint64(*n))
}

func (f *fingerprinter) flush() { _, _ = f.Write(f.buf) } // a hash takes everything
