// Package client is how other programs use sandboxd: a connection, thin helpers for the calls that stream, and errors
// with the reasons programs act on. It knows the API and nothing of the daemon.
//
//	c, err := client.Dial(client.DefaultAddress)
//	...
//	defer c.Close()
//	exit, err := c.Run(ctx, &sandboxdv1.CreateWorkloadRequest{
//		Spec: &sandboxdv1.WorkloadSpec{
//			Image: "debian", Isolation: sandboxdv1.Isolation_ISOLATION_AUTO,
//			Process: &sandboxdv1.ProcessSpec{Command: []string{"uname", "-r"}},
//		},
//	}, client.RunOptions{Stdio: client.Stdio{Stdout: os.Stdout, Stderr: os.Stderr}, Remove: true})
//
// # Connecting
//
// [Dial] is for the Unix socket, where the kernel tells the daemon who calls; [DialTLS] for TCP, where both sides show
// certificates. Neither connects yet. One [Client] serves any number of goroutines, and connects again by itself when the
// daemon was restarted: calls under way end with the reason DAEMON_STOPPING or UNREACHABLE, workloads go on running.
//
// # Calls
//
// Calls with one answer are made on the generated clients that a Client holds: Workloads, Images, Policy, System, Templates.
// Those that stream have helpers: [Client.Run], [Client.Exec], [Client.Attach], [Client.Logs], [Client.Watch],
// [Client.CopyIn], [Client.CopyOut], [Client.ImportImage] and [Client.PullImage]; [Client.ListWorkloads] and
// [Client.ListImages] go through all pages. Every call is bounded by its context alone.
//
// # Errors
//
// A call that failed returns an [*Error] (errors.As): its Reason is one of the constants here or another that
// docs/operations.md lists, Field or Rule say what was at fault. status.Code works on it, too.
//
// examples/go-client is a whole program; docs/clients.md tells of other languages.
package client

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"os"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
)

const (
	// DefaultAddress is where sandboxd listens unless told otherwise.
	DefaultAddress = "unix:///run/sandboxd/sandboxd.sock"

	// maxAnswerBytes bounds one message of the daemon; its largest are pages of workloads, cut at 16 MiB.
	maxAnswerBytes = 64 << 20
	// windowBytes is how much of one stream may be under way before its reader has to read.
	windowBytes = 512 << 10
	// pieceBytes is the size of the pieces in which bytes are sent; the API allows 1 MiB.
	pieceBytes = 256 << 10
	// keepaliveIdle and keepaliveTimeout find a daemon that hangs: it is asked after so long a silence during a call,
	// and given so long to answer.
	keepaliveIdle    = 30 * time.Second
	keepaliveTimeout = 30 * time.Second
)

// Client is a connection to one daemon. It may be used by many goroutines at once.
type Client struct {
	Workloads sandboxdv1.WorkloadServiceClient
	Images    sandboxdv1.ImageServiceClient
	Policy    sandboxdv1.PolicyServiceClient
	System    sandboxdv1.SystemServiceClient
	Templates sandboxdv1.TemplateServiceClient
	Snapshots sandboxdv1.SnapshotServiceClient

	conn *grpc.ClientConn
	// Path of the daemon's Unix socket; empty over TCP.
	socket string
}

// TLS is what a client needs over TCP: PEM files.
type TLS struct {
	// Authority of the daemon's certificate.
	CA string
	// Who the client is.
	Cert, Key string
	// Name in the daemon's certificate; the address's host when empty.
	ServerName string
}

// Dial makes a client for a daemon at an address such as unix:///run/sandboxd/sandboxd.sock. It does not connect yet:
// the first call does, and its error tells when nobody is there.
func Dial(address string) (*Client, error) {
	path, ok := strings.CutPrefix(address, "unix://")
	if !ok || !strings.HasPrefix(path, "/") {
		return nil, fmt.Errorf("cannot use address %q: it must look like %s, or tcp://HOST:PORT with certificates", address, DefaultAddress)
	}
	// The socket's mode says who may connect, and the daemon asks the kernel who did: there is nothing to encrypt.
	c, err := connect(address, "unix://"+path, insecure.NewCredentials())
	if err != nil {
		return nil, err
	}
	c.socket = path
	return c, nil
}

// DialTLS makes a client for a daemon at an address such as tcp://10.0.0.1:7443.
func DialTLS(address string, files TLS) (*Client, error) {
	hostPort, ok := strings.CutPrefix(address, "tcp://")
	if _, _, err := net.SplitHostPort(hostPort); !ok || err != nil {
		return nil, fmt.Errorf("cannot use address %q: it must look like tcp://HOST:PORT", address)
	}
	pair, err := tls.LoadX509KeyPair(files.Cert, files.Key)
	if err != nil {
		return nil, fmt.Errorf("cannot load the client's certificate: %w", err)
	}
	pem, err := os.ReadFile(files.CA)
	if err != nil {
		return nil, fmt.Errorf("cannot load the daemon's authority: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("cannot load the daemon's authority: %s has no certificate in PEM", files.CA)
	}
	return connect(address, "dns:///"+hostPort, credentials.NewTLS(&tls.Config{
		Certificates: []tls.Certificate{pair}, RootCAs: pool, ServerName: files.ServerName, MinVersion: tls.VersionTLS13,
	}))
}

func connect(address, target string, creds credentials.TransportCredentials) (*Client, error) {
	wrap := &errorWrapper{address: address}
	conn, err := grpc.NewClient(target,
		grpc.WithTransportCredentials(creds),
		grpc.WithUnaryInterceptor(wrap.unary),
		grpc.WithStreamInterceptor(wrap.stream),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxAnswerBytes)),
		grpc.WithInitialWindowSize(windowBytes),
		grpc.WithInitialConnWindowSize(windowBytes),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: keepaliveIdle, Timeout: keepaliveTimeout}),
		grpc.WithNoProxy(),
	)
	if err != nil {
		return nil, fmt.Errorf("cannot use address %q: %w", address, err)
	}
	return &Client{
		Workloads: sandboxdv1.NewWorkloadServiceClient(conn),
		Images:    sandboxdv1.NewImageServiceClient(conn),
		Policy:    sandboxdv1.NewPolicyServiceClient(conn),
		System:    sandboxdv1.NewSystemServiceClient(conn),
		Templates: sandboxdv1.NewTemplateServiceClient(conn),
		Snapshots: sandboxdv1.NewSnapshotServiceClient(conn),
		conn:      conn,
	}, nil
}

// Close ends the connection and every call on it.
func (c *Client) Close() error { return c.conn.Close() }

// Conn is the connection, for gRPC services beside sandboxd's own, such as health.
func (c *Client) Conn() *grpc.ClientConn { return c.conn }
