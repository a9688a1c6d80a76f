package server

import (
	"context"
	"errors"
	"fmt"
	"net"
	"unsafe"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// maxGroups bounds the supplementary groups asked of the kernel: NGROUPS_MAX.
const maxGroups = 65536

// peerCredentials learns who connected: over a Unix socket from the kernel, over TCP from a certificate. The kernel
// fixes SO_PEERCRED and SO_PEERGROUPS at connect time, so neither can be forged or change later. Whoever cannot be known
// is refused.
type peerCredentials struct {
	// Nil refuses TCP.
	tls   *TLSFiles
	crowd *crowd
	pipes *pipes
}

// peerInfo is what peerCredentials learned.
type peerInfo struct {
	credentials.CommonAuthInfo
	caller spec.Caller
	// Over TCP.
	proof *proof
}

func (peerInfo) AuthType() string { return "peercred" }

func (c peerCredentials) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	switch conn := conn.(type) {
	case *net.UnixConn:
		return c.unixHandshake(conn)
	case *net.TCPConn:
		return c.tlsHandshake(conn)
	}
	return nil, nil, fmt.Errorf("cannot identify the caller: a %T tells nothing of it", conn)
}

func (c peerCredentials) unixHandshake(conn *net.UnixConn) (net.Conn, credentials.AuthInfo, error) {
	caller, err := callerOfConn(conn)
	if err != nil {
		return nil, nil, fmt.Errorf("cannot identify the caller: %w", err)
	}
	counted, err := c.crowd.enter(caller.Key(), conn)
	if err != nil {
		return nil, nil, err
	}
	first, err := firstByte(conn)
	if err == nil && first != http2First {
		if err = c.pipes.offer(conn, caller.Key()); err == nil {
			err = credentials.ErrConnDispatched
		}
	}
	if err != nil {
		counted.Close()
		return nil, nil, err
	}
	// The bytes never leave the host's kernel.
	common := credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}
	return counted, peerInfo{CommonAuthInfo: common, caller: caller}, nil
}

func (c peerCredentials) tlsHandshake(conn *net.TCPConn) (net.Conn, credentials.AuthInfo, error) {
	if c.tls == nil {
		return nil, nil, errors.New("cannot identify the caller: the daemon was given no certificates")
	}
	// Before anything is proved a peer is known by its address, which costs it nothing.
	host, _, err := net.SplitHostPort(conn.RemoteAddr().String())
	if err != nil {
		return nil, nil, fmt.Errorf("cannot identify the caller: %w", err)
	}
	byHost, err := c.crowd.enter("host:"+host, conn)
	if err != nil {
		return nil, nil, err
	}
	state := c.tls.current()
	secure, info, err := credentials.NewTLS(state.config).ServerHandshake(byHost)
	if err != nil {
		return nil, nil, errors.Join(err, byHost.Close())
	}
	tlsInfo, ok := info.(credentials.TLSInfo)
	if !ok || len(tlsInfo.State.VerifiedChains) == 0 || len(tlsInfo.State.PeerCertificates) == 0 {
		return nil, nil, errors.Join(errors.New("cannot identify the caller: it showed no certificate"), secure.Close())
	}
	caller, err := callerOfCertificate(tlsInfo.State.PeerCertificates[0])
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("cannot identify the caller: %w", err), secure.Close())
	}
	counted, err := c.crowd.enter(caller.Key(), secure)
	if err != nil {
		return nil, nil, err
	}
	common := credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}
	return counted, peerInfo{CommonAuthInfo: common, caller: caller,
		proof: &proof{files: c.tls, state: state, certs: tlsInfo.State.PeerCertificates}}, nil
}

func (peerCredentials) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("peer credentials are for servers only")
}

func (peerCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "peercred"}
}

func (c peerCredentials) Clone() credentials.TransportCredentials { return c }

func (peerCredentials) OverrideServerName(string) error { return nil }

func callerOfConn(conn *net.UnixConn) (spec.Caller, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return spec.Caller{}, err
	}
	var caller spec.Caller
	var inner error
	err = raw.Control(func(fd uintptr) {
		var cred *unix.Ucred
		if cred, inner = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); inner != nil {
			return
		}
		caller.UID, caller.GID, caller.PID = cred.Uid, cred.Gid, cred.Pid
		caller.GIDs, inner = peerGroups(int(fd))
	})
	return caller, errors.Join(err, inner)
}

// peerGroups asks for SO_PEERGROUPS, which x/sys has no wrapper for: the kernel fills an array of gid_t, or answers
// ERANGE and the length it needs (net/core/sock.c).
func peerGroups(fd int) ([]uint32, error) {
	groups := make([]uint32, 64)
	for {
		size := uint32(len(groups) * 4)
		_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_PEERGROUPS,
			uintptr(unsafe.Pointer(&groups[0])), uintptr(unsafe.Pointer(&size)), 0)
		n := int(size / 4)
		switch {
		case errno == 0:
			return groups[:n], nil
		case errno == unix.ERANGE && n > len(groups) && n <= maxGroups:
			groups = make([]uint32, n)
		default:
			return nil, fmt.Errorf("cannot read SO_PEERGROUPS: %w", errno)
		}
	}
}

// callerOf is who made the call of ctx. ok is false when the transport proved nobody, or what it proved is over.
func callerOf(ctx context.Context) (caller spec.Caller, ok bool) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return spec.Caller{}, false
	}
	info, ok := p.AuthInfo.(peerInfo)
	if ok && info.proof != nil && !info.proof.holds() {
		return spec.Caller{}, false
	}
	return info.caller, ok
}
