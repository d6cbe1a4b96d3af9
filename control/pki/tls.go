package pki

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"
)

// Files are the files that one end of a connection is configured with. They are read again when they change, so that certificates are rotated by
// replacing them; connections that stand are not touched.
type Files struct {
	CA   string // certificates of the authorities of the other end
	Cert string
	Key  string
}

// checkEvery is how often the files are looked at, at most.
const checkEvery = time.Second

// loaded follows the files.
type loaded struct {
	files Files

	mu      sync.Mutex
	checked time.Time
	stamps  [3]stamp
	cert    *tls.Certificate
	pool    *x509.CertPool
}

type stamp struct {
	modified time.Time
	size     int64
}

// get returns what the files have. If they cannot be used any more, what they had stays: they may be half replaced.
func (l *loaded) get() (*tls.Certificate, *x509.CertPool, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.cert != nil && time.Since(l.checked) < checkEvery {
		return l.cert, l.pool, nil
	}
	l.checked = time.Now()
	var stamps [3]stamp
	for i, f := range []string{l.files.CA, l.files.Cert, l.files.Key} {
		if info, err := os.Stat(f); err == nil {
			stamps[i] = stamp{info.ModTime(), info.Size()}
		}
	}
	if l.cert != nil && stamps == l.stamps {
		return l.cert, l.pool, nil
	}
	cert, pool, err := l.read()
	if err != nil {
		if l.cert != nil {
			return l.cert, l.pool, nil
		}
		return nil, nil, err
	}
	l.stamps, l.cert, l.pool = stamps, cert, pool
	return cert, pool, nil
}

func (l *loaded) read() (*tls.Certificate, *x509.CertPool, error) {
	cert, err := tls.LoadX509KeyPair(l.files.Cert, l.files.Key)
	if err != nil {
		return nil, nil, fmt.Errorf("certificate %s with key %s: %w", l.files.Cert, l.files.Key, err)
	}
	text, err := os.ReadFile(l.files.CA)
	if err != nil {
		return nil, nil, fmt.Errorf("certificates of the authority: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(text) {
		return nil, nil, fmt.Errorf("%s has no certificate", l.files.CA)
	}
	return &cert, pool, nil
}

// load reads the files for the first time, and says what is wrong with them.
func (f Files) load() (*loaded, error) {
	l := &loaded{files: f}
	cert, _, err := l.get()
	if err != nil {
		return nil, err
	}
	if now := time.Now(); cert.Leaf != nil && now.After(cert.Leaf.NotAfter) {
		return nil, fmt.Errorf("certificate %s expired on %s: issue a new one", f.Cert, cert.Leaf.NotAfter.Format(time.DateTime))
	}
	return l, nil
}

// Leaf is the certificate that the files have.
func (f Files) Leaf() (*x509.Certificate, error) {
	cert, _, err := (&loaded{files: f}).read()
	if err != nil {
		return nil, err
	}
	return cert.Leaf, nil
}

// Server is the configuration of a listener that takes certificates of the authority with one of the roles only.
func (f Files) Server(roles ...Role) (*tls.Config, error) {
	l, err := f.load()
	if err != nil {
		return nil, err
	}
	base := &tls.Config{MinVersion: tls.VersionTLS13, ClientAuth: tls.RequireAndVerifyClientCert, NextProtos: []string{"h2"}}
	base.VerifyConnection = func(s tls.ConnectionState) error {
		for _, r := range roles {
			if HasRole(s.PeerCertificates[0], r) {
				return nil
			}
		}
		return fmt.Errorf("the certificate of %q is of organization %v: want one of %v", s.PeerCertificates[0].Subject.CommonName, s.PeerCertificates[0].Subject.Organization, roles)
	}
	base.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) {
		cert, pool, err := l.get()
		if err != nil {
			return nil, err
		}
		c := base.Clone()
		c.GetConfigForClient = nil
		c.Certificates, c.ClientCAs = []tls.Certificate{*cert}, pool
		return c, nil
	}
	return base, nil
}

// Client is the configuration of one who dials a controller. serverName is the name or address that the controller's certificate must have.
func (f Files) Client(serverName string) (*tls.Config, error) {
	if serverName == "" {
		return nil, errors.New("it is not known which name the controller's certificate must have")
	}
	l, err := f.load()
	if err != nil {
		return nil, err
	}
	c := &tls.Config{MinVersion: tls.VersionTLS13, ServerName: serverName, NextProtos: []string{"h2"}}
	c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
		cert, _, err := l.get()
		return cert, err
	}
	// The authorities may change, which tls.Config.RootCAs could not: so the chain is verified here, as crypto/tls would.
	c.InsecureSkipVerify = true
	c.VerifyConnection = func(s tls.ConnectionState) error {
		_, pool, err := l.get()
		if err != nil {
			return err
		}
		if len(s.PeerCertificates) == 0 {
			return errors.New("the controller has no certificate")
		}
		o := x509.VerifyOptions{Roots: pool, DNSName: serverName, Intermediates: x509.NewCertPool(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
		for _, i := range s.PeerCertificates[1:] {
			o.Intermediates.AddCert(i)
		}
		_, err = s.PeerCertificates[0].Verify(o)
		return err
	}
	return c, nil
}
