// Package pki is the small certificate authority of a cluster, and the TLS configurations made of what it issues.
//
//	Init ─> ca.crt, ca.key        Issue ─> NAME.crt, NAME.key        Files.Server, Files.Client ─> tls.Config that follows the files
//
// A certificate says what its holder is: its organization is a Role, its common name the node's (or the administrator's, or controller's) name. Certificates of
// another authority serve as well if they say the same, with the extended key usage of the role: clientAuth for nodes and administrators,
// serverAuth for controllers.
package pki

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"slices"
	"time"
)

// Role is what the holder of a certificate is: the certificate's organization.
type Role string

// The roles.
const (
	Node       Role = "overplane:nodes"
	Admin      Role = "overplane:admins"
	Controller Role = "overplane:controllers"
)

// Roles by the words that people use.
var Roles = map[string]Role{"node": Node, "admin": Admin, "controller": Controller}

// Names of the authority's files.
const (
	CACert = "ca.crt"
	CAKey  = "ca.key"
)

// Validity of certificates.
const (
	CAValidity   = 10 * 365 * 24 * time.Hour
	LeafValidity = 365 * 24 * time.Hour
	// backdate lets certificates be used at once on machines whose clocks are behind.
	backdate = 5 * time.Minute
)

// Init makes an authority in dir: ca.crt and ca.key. One that is there is an error.
func Init(dir, name string, now time.Time) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	template := &x509.Certificate{
		SerialNumber: serial(), Subject: pkix.Name{CommonName: name}, NotBefore: now.Add(-backdate), NotAfter: now.Add(CAValidity),
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, BasicConstraintsValid: true, IsCA: true, MaxPathLenZero: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return err
	}
	return write(filepath.Join(dir, CACert), filepath.Join(dir, CAKey), der, key, "there is an authority in "+dir+" already")
}

// Request is what a certificate is to say.
type Request struct {
	Role     Role
	Name     string
	Hosts    []string      // controllers: the addresses and DNS names that nodes dial
	Validity time.Duration // 0: LeafValidity
}

// Issue makes a certificate and its key, cert and key, by the authority in dir. Files that are there are an error unless replace.
func Issue(dir string, r Request, cert, key string, replace bool, now time.Time) error {
	ca, caKey, err := load(dir)
	if err != nil {
		return err
	}
	if r.Name == "" {
		return errors.New("a certificate needs a name")
	}
	if r.Validity == 0 {
		r.Validity = LeafValidity
	}
	template := &x509.Certificate{
		SerialNumber: serial(), Subject: pkix.Name{CommonName: r.Name, Organization: []string{string(r.Role)}},
		NotBefore: now.Add(-backdate), NotAfter: now.Add(r.Validity), KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true,
	}
	if template.NotAfter.After(ca.NotAfter) {
		template.NotAfter = ca.NotAfter
	}
	switch r.Role {
	case Controller:
		if len(r.Hosts) == 0 {
			return errors.New("a controller's certificate needs the addresses or DNS names that nodes dial")
		}
		template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
		for _, h := range r.Hosts {
			if ip := net.ParseIP(h); ip != nil {
				template.IPAddresses = append(template.IPAddresses, ip)
			} else {
				template.DNSNames = append(template.DNSNames, h)
			}
		}
	case Node, Admin:
		template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	default:
		return fmt.Errorf("role %q: want node, admin or controller", r.Role)
	}
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca, k.Public(), caKey)
	if err != nil {
		return err
	}
	if replace {
		for _, f := range []string{cert, key} {
			if err := os.Remove(f); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
	}
	return write(cert, key, der, k, "they are not replaced unless told to")
}

func serial() *big.Int {
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		panic(err) // the system's random numbers do not fail
	}
	return n
}

// write writes a certificate and its key into new files.
func write(cert, key string, der []byte, k *ecdsa.PrivateKey, exists string) error {
	keyDER, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		return err
	}
	for _, f := range []string{cert, key} {
		if _, err := os.Lstat(f); err == nil {
			return fmt.Errorf("%s exists: %s", f, exists)
		}
	}
	if err := writeFile(key, "PRIVATE KEY", keyDER, 0o600); err != nil {
		return err
	}
	return writeFile(cert, "CERTIFICATE", der, 0o644)
}

func writeFile(name, kind string, der []byte, mode fs.FileMode) error {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	err = pem.Encode(f, &pem.Block{Type: kind, Bytes: der})
	return errors.Join(err, f.Sync(), f.Close())
}

// load reads the authority in dir.
func load(dir string) (*x509.Certificate, crypto.Signer, error) {
	certPEM, err := os.ReadFile(filepath.Join(dir, CACert))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, fmt.Errorf("there is no authority in %s: overplane-controller pki init makes one", dir)
	}
	if err != nil {
		return nil, nil, err
	}
	keyPEM, err := os.ReadFile(filepath.Join(dir, CAKey))
	if err != nil {
		return nil, nil, err
	}
	cb, _ := pem.Decode(certPEM)
	kb, _ := pem.Decode(keyPEM)
	if cb == nil || kb == nil {
		return nil, nil, fmt.Errorf("the authority in %s is not PEM", dir)
	}
	ca, err := x509.ParseCertificate(cb.Bytes)
	if err != nil {
		return nil, nil, err
	}
	k, err := x509.ParsePKCS8PrivateKey(kb.Bytes)
	if err != nil {
		return nil, nil, err
	}
	signer, ok := k.(crypto.Signer)
	if !ok {
		return nil, nil, fmt.Errorf("%s is no key that signs", filepath.Join(dir, CAKey))
	}
	return ca, signer, nil
}

// HasRole reports whether a certificate's holder has the role.
func HasRole(c *x509.Certificate, r Role) bool {
	return slices.Contains(c.Subject.Organization, string(r))
}
