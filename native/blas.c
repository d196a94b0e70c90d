// MLX's Linux wheel for the CPU binds three functions to the reference BLAS, which is slow. Loaded globally before libmlx, this
// object takes their names and passes the calls on to whatever `mlxrs_blas_use` was given: OpenBLAS, which exports them
// under other names.

#define EXPORT __attribute__((visibility("default")))

typedef void (*sgemm_fn)(int, int, int, int, int, int, float, const float *, int, const float *, int, float, float *, int);
typedef void (*dgemm_fn)(int, int, int, int, int, int, double, const double *, int, const double *, int, double, double *, int);
typedef void (*cgemm_fn)(int, int, int, int, int, int, const void *, const void *, int, const void *, int, const void *, void *, int);

static sgemm_fn sgemm;
static dgemm_fn dgemm;
static cgemm_fn cgemm;

// Called once, before libmlx is loaded and so before any thread can call.
EXPORT void mlxrs_blas_use(sgemm_fn s, dgemm_fn d, cgemm_fn c) {
  sgemm = s;
  dgemm = d;
  cgemm = c;
}

EXPORT void cblas_sgemm(int order, int ta, int tb, int m, int n, int k, float alpha, const float *a, int lda,
                        const float *b, int ldb, float beta, float *c, int ldc) {
  sgemm(order, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

EXPORT void cblas_dgemm(int order, int ta, int tb, int m, int n, int k, double alpha, const double *a, int lda,
                        const double *b, int ldb, double beta, double *c, int ldc) {
  dgemm(order, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

EXPORT void cblas_cgemm(int order, int ta, int tb, int m, int n, int k, const void *alpha, const void *a, int lda,
                        const void *b, int ldb, const void *beta, void *c, int ldc) {
  cgemm(order, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
