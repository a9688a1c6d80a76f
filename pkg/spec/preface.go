package spec

// An agent that dials the daemon (in a VM, over vsock) starts every connection with a preface, so that the daemon knows
// the boot it belongs to before it reads anything else:
//
//	bytes 0-3   "SBXA"
//	byte  4     preface version, 1
//	bytes 5-36  the boot token, 32 random bytes the daemon gave the guest in its initramfs
//
// After it the connection carries ttrpc, the daemon being the client.
const (
	PrefaceMagic   = "SBXA"
	PrefaceVersion = 1
	TokenLen       = 32
	PrefaceLen     = len(PrefaceMagic) + 1 + TokenLen
)

// Preface returns the bytes an agent sends first.
func Preface(token [TokenLen]byte) []byte {
	b := make([]byte, 0, PrefaceLen)
	b = append(b, PrefaceMagic...)
	b = append(b, PrefaceVersion)
	return append(b, token[:]...)
}
