package microvm

import (
	"bytes"
	"net"
	"testing"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// FuzzPreface: whatever comes, in whatever pieces, only the preface of this boot is let in.
func FuzzPreface(f *testing.F) {
	var token, other bootToken
	for i := range token {
		token[i], other[i] = byte(i), byte(i+1)
	}
	good := spec.Preface(token)
	f.Add(good, uint8(len(good)))
	f.Add(good, uint8(1))
	f.Add(good[:len(good)-1], uint8(3))
	f.Add(append(bytes.Clone(good), "and more"...), uint8(7))
	f.Add(spec.Preface(other), uint8(0))
	f.Add([]byte{}, uint8(0))
	f.Fuzz(func(t *testing.T, b []byte, piece uint8) {
		guest, host := net.Pipe()
		defer guest.Close()
		defer host.Close()
		whole := bytes.HasPrefix(b, good)
		go func() { // ends when either end is closed
			if !whole {
				defer guest.Close()
			}
			for step := max(1, int(piece)); len(b) > 0; {
				n := min(step, len(b))
				if _, err := guest.Write(b[:n]); err != nil {
					return
				}
				b = b[n:]
			}
		}()
		if err := readPreface(host, token); (err == nil) != whole {
			t.Errorf("the preface: %v, error %v", whole, err)
		}
	})
}
